"""Alignment against loops over samples, tokens and states in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from alula.errors import HostError, UsageError
from alula.probes import Alignment, Resampling, noise_prompt, untrained_connector
from alula.probes.similarity import cka, neighbours, shared_neighbours
from tests import zoo
from tests.probes.models import deep, singles, states

LAYOUTS = ("3I4I2", "2I5", "1I6", "7", "4I3", "I2", "3I")
SITES = ("stream", "attention_norm", "attention", "mlp_norm", "mlp")


@pytest.fixture(scope="module")
def samples(model: Any, inputs: dict[str, Any]) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Per sample with both kinds: {site: (image tokens (N, n, d), text tokens after the first image (N, m, d))}."""
    found = []
    for sample in singles(inputs):
        ids = sample["input_ids"][0].tolist()
        image = [i for i, token in enumerate(ids) if token == zoo.IMAGE and i > 0]
        text = [i for i, token in enumerate(ids) if image and token != zoo.IMAGE and i > image[0]]
        if text:
            found.append({site: (x[:, image], x[:, text]) for site, x in states(model, sample).items()})
    return found


@pytest.fixture(scope="module")
def probe(model: Any, inputs: dict[str, Any]) -> Alignment:
    probe = Alignment(sites=SITES)
    with probe.on(model), torch.no_grad():
        model(**inputs)
    return probe


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def values(curve: Any) -> list[float]:
    return [estimate.value for estimate in curve]


@pytest.mark.parametrize("site", SITES)
def test_cosines_equal_loops_over_pairs(probe: Alignment, samples: Any, site: str) -> None:
    pair = probe.result().pairs["image-text"]
    assert pair.samples == pair.kept == len(samples) == 5
    measured = pair.sites[site]
    for state in range(len(samples[0][site][0])):
        p = [s[site][0][state].mean(axis=0) for s in samples]
        t = [s[site][1][state].mean(axis=0) for s in samples]
        first = [s["stream"][0][0].mean(axis=0) for s in samples]
        pc, tc = (z - np.mean(z, axis=0) for z in (p, t))
        every = [(i, j) for i in range(len(p)) for j in range(len(p))]
        expected = {
            "all_pairs": np.mean([cos(p[i], t[j]) for i, j in every]),
            "matched": np.mean([cos(a, b) for a, b in zip(p, t, strict=True)]),
            "mismatched": np.mean([cos(p[i], t[j]) for i, j in every if i != j]),
            "input_prompt": np.mean([cos(first[i], t[j]) for i, j in every]),
            "input_prompt_matched": np.mean([cos(a, b) for a, b in zip(first, t, strict=True)]),
        }
        for name, value in expected.items():
            assert getattr(measured, name)[state].value == pytest.approx(value, abs=1e-7), name
        centred = {
            "centred_matched": np.mean([cos(a, b) for a, b in zip(pc, tc, strict=True)]),
            "centred_mismatched": np.mean([cos(pc[i], tc[j]) for i, j in every if i != j]),
        }
        for name, value in centred.items():  # from the float32 reservoir
            assert getattr(measured, name)[state].value == pytest.approx(value, abs=1e-5), name


def test_each_row_counts_once_in_row_mode(model: Any, inputs: dict[str, Any], samples: Any) -> None:
    probe = Alignment(tokens="each")
    with probe.on(model), torch.no_grad():
        model(**inputs)
    measured = probe.result().pairs["image-text"].sites["stream"]
    for state in range(4):
        grid = [
            [np.mean([cos(a, b) for a in s["stream"][0][state] for b in o["stream"][1][state]]) for o in samples]
            for s in samples
        ]
        assert measured.all_pairs[state].value == pytest.approx(np.mean(grid), abs=1e-7)
        assert measured.matched[state].value == pytest.approx(np.mean(np.diag(grid)), abs=1e-7)


def test_scores_are_means_over_the_whole_stream(probe: Alignment) -> None:
    pair = probe.result().pairs["image-text"]
    stream = pair.sites["stream"]
    assert len(stream.all_pairs) == 4
    assert pair.score.value == pytest.approx(np.mean(values(stream.all_pairs)))
    assert pair.score_input_prompt.value == pytest.approx(np.mean(values(stream.input_prompt)))
    assert pair.contrast_score.value == pytest.approx(np.mean(values(stream.centred_contrast)))
    assert pair.score.low <= pair.score.value <= pair.score.high


def naive_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased HSIC of Song et al. 2012, by its sums over distinct indices."""
    n, k, m = len(x), x @ x.T, y @ y.T
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    crossed = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return float((np.trace(k @ m) + crossed) / (n * (n - 3)))


def test_cka_equals_its_definitions() -> None:
    rng = np.random.default_rng(0)
    x, shared = rng.normal(size=(12, 40)), rng.normal(size=(12, 6))
    y = np.concatenate([x[:, :5], shared], axis=1)
    xc, yc = x - x.mean(axis=0), y - y.mean(axis=0)
    plain = np.linalg.norm(xc.T @ yc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    assert cka(x @ x.T, y @ y.T, debiased=False)[0] == pytest.approx(plain)
    fair = naive_hsic(x, y) / np.sqrt(naive_hsic(x, x) * naive_hsic(y, y))
    assert cka(x @ x.T, y @ y.T, debiased=True)[0] == pytest.approx(fair)
    order = rng.permutation(12)
    for debiased in (False, True):
        permuted = cka(x @ x.T, y @ y.T, debiased=debiased, orders=order[None])[1][0]
        assert permuted == pytest.approx(cka(x @ x.T, y[order] @ y[order].T, debiased=debiased)[0])
        assert cka(x @ x.T, x @ x.T, debiased=debiased)[0] == pytest.approx(1)


def test_unrelated_wide_sets_have_debiased_cka_near_zero() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 40, 2000))
    assert cka(x @ x.T, y @ y.T, debiased=False)[0] > 0.9
    assert abs(cka(x @ x.T, y @ y.T, debiased=True)[0]) < 0.05


def test_mutual_neighbours_equal_sets() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 15, 4))
    y[:8] = x[:8]
    shared = []
    for i in range(15):
        near = [set(sorted((j for j in range(15) if j != i), key=lambda j, z=z: -z[i] @ z[j])[:4]) for z in (x, y)]
        shared.append(len(near[0] & near[1]) / 4)
    found = shared_neighbours(neighbours(x @ x.T, 4), neighbours(y @ y.T, 4))
    np.testing.assert_allclose(found, shared)


def feed(probe: Alignment, x: torch.Tensor, y: torch.Tensor) -> Alignment:
    """Give the probe vectors (n, N, d) as if a model had made them."""
    probe._add("image-text", {"stream": (x.double(), y.double())})
    return probe


def test_nulls_tell_pairs_from_strangers() -> None:
    torch.manual_seed(0)
    common, own = torch.randn(1, 2, 16) * 5, torch.randn(60, 2, 16)
    how = Resampling(resamples=200, permutations=99)
    paired = feed(Alignment(), common + own, common + own + torch.randn(60, 2, 16)).result(how).pairs["image-text"]
    strangers = feed(Alignment(), common + own, common + torch.randn(60, 2, 16)).result(how).pairs["image-text"]
    for name in ("matched", "centred_matched", "cka", "cka_debiased", "mutual_knn"):
        assert paired.sites["stream"].nulls[name][0].p == pytest.approx(0.01), name
        assert strangers.sites["stream"].nulls[name][0].p > 0.05, name
    # a shared direction alone makes the published score high and the mean-removed contrast zero
    assert strangers.score.value > 0.8
    assert strangers.contrast_score.low < 0 < strangers.contrast_score.high
    assert paired.contrast_score.low > 0
    assert paired.sites["stream"].mutual_knn[0].low > paired.neighbours_chance


def test_a_full_reservoir_keeps_exact_means() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 200, 1, 8)
    bounded, whole = feed(Alignment(keep=40), x, y).result(), feed(Alignment(keep=300), x, y).result()
    one, other = bounded.pairs["image-text"], whole.pairs["image-text"]
    assert (one.samples, one.kept, other.kept) == (200, 40, 200)
    assert one.score.value == pytest.approx(other.score.value)
    assert one.score.low < one.score.value < one.score.high
    width, wide = (p.score.high - p.score.low for p in (one, other))
    assert 0.4 < width / wide < 2.5


def test_reservoirs_do_not_depend_on_the_split() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3000, 1, 8)
    parts = [feed(Alignment(keep=16), x[pick], y[pick]) for pick in (slice(30, 3000), slice(0, 7), slice(7, 30))]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    whole = Alignment(keep=16)
    for start in range(0, 3000, 300):  # more than may wait to be drawn from
        feed(whole, x[start : start + 300], y[start : start + 300])
    for name, kept in whole.reservoir("image-text").entries.items():
        assert torch.equal(kept, merged.reservoir("image-text").entries[name])


def test_reservoirs_are_uniform() -> None:
    hits = torch.zeros(20)
    for seed in range(300):
        probe = Alignment(keep=5, seed=seed)
        x = torch.arange(20.0)[:, None, None] + 1
        feed(probe, x, x)
        hits[(probe.reservoir("image-text").entries["x/stream"].flatten() - 1).long()] += 1
    assert hits.sum() == 1500
    assert ((hits - 75) ** 2 / 75).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_noise_replaces_only_what_was_seen(inputs: dict[str, Any]) -> None:
    model = deep(layers=3, sliding=False).double()
    sample = singles(inputs)[1]
    plain = states(model, sample)["stream"][0]
    for noise in ("gaussian", "uniform"):
        with noise_prompt(model, noise, seed=3):
            noisy = states(model, sample)["stream"][0]
        with noise_prompt(model, noise, seed=3):
            again = states(model, sample)["stream"][0]
        changed = (noisy != plain).any(axis=1)
        assert changed.tolist() == (sample["input_ids"][0] == zoo.IMAGE).tolist()
        np.testing.assert_array_equal(noisy, again)
    np.testing.assert_array_equal(states(model, sample)["stream"][0], plain)
    with pytest.raises(UsageError, match="noise cannot be"), noise_prompt(model, "pink"):
        pass


def test_the_connector_comes_back_trained(inputs: dict[str, Any]) -> None:
    model = deep(layers=3, sliding=False).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe = Alignment()
    with untrained_connector(model), probe.on(model), torch.no_grad():
        assert not torch.equal(
            model.model.multi_modal_projector.linear_1.weight, before["model.multi_modal_projector.linear_1.weight"]
        )
        model(**inputs)
    assert probe.result().pairs["image-text"].samples == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(HostError, match="no projector"), untrained_connector(zoo.build("llama")):
        pass


def test_text_only_batches_have_no_alignment(model: Any) -> None:
    probe = Alignment()
    with probe.on(model), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(UsageError, match="no sample with both"):
        probe.result()


@pytest.mark.parametrize(
    "option", [{"text": "words"}, {"tokens": "max"}, {"sites": ("head",)}, {"sites": ()}, {"neighbours": 0}]
)
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Alignment(**option)
