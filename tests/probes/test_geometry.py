"""Geometry against loops over samples, tokens and states in float64."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from alula.errors import SeamError, UsageError
from alula.probes import Geometry
from alula.probes.projection import to_plane
from tests import zoo
from tests.probes.models import deep, singles, states

LAYOUTS = ("3I4I2", "2I5", "1I6", "7", "I3")
SITES = ("stream", "attention_norm", "attention", "mlp_norm", "mlp")
FACTOR = 1.3  # low enough that tiny random models have sinks


@pytest.fixture(scope="module")
def samples(model: Any, inputs: dict[str, Any]) -> Any:
    """Per sample: {site: (N, S, d)} and the kind of every token."""
    return [
        (states(model, s), np.array(["image" if t == zoo.IMAGE else "text" for t in s["input_ids"][0].tolist()]))
        for s in singles(inputs)
    ]


def measure(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    probe = Geometry(sink_factor=FACTOR, **options)
    with probe.on(model), torch.no_grad():
        model(**inputs)
    return probe.result()


def pick(x: np.ndarray, kinds: np.ndarray, kind: str) -> tuple[list[int], list[int]]:
    """(plain, sink) token numbers of a kind, the first token apart, for states x (S, d) of one sample."""
    length = np.linalg.norm(x, axis=1)
    tokens = [i for i in range(1, len(x)) if kinds[i] == kind]
    sinks = [i for i in tokens if length[i] > FACTOR * np.median(length)]
    plain = [i for i in tokens if i not in sinks]
    return plain or tokens, sinks


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def values(curve: Any) -> list[float]:
    return [estimate.value for estimate in curve]


@pytest.mark.parametrize("of", ["samples", "tokens"])
def test_similarities_equal_loops(model: Any, inputs: dict[str, Any], samples: Any, of: str) -> None:
    result = measure(model, inputs, sites=SITES, of=of)
    for site in SITES:
        for state in range(len(samples[0][0][site])):
            members: dict[str, list[tuple[int, np.ndarray]]] = {"image": [], "text": []}
            for number, (x, kinds) in enumerate(samples):
                for kind, found in members.items():
                    plain, _ = pick(x[site][state], kinds, kind)
                    tokens = x[site][state][plain]
                    if len(tokens):
                        found.extend((number, token) for token in (tokens if of == "tokens" else [tokens.mean(axis=0)]))
            measured = result.sites[site]
            for kind, found in members.items():
                expected = np.mean([cos(a, b) for (_, a), (_, b) in combinations(found, 2)])
                assert measured.kinds[kind].within[state] == pytest.approx(expected, abs=1e-7)
            across = [cos(a, b) for i, a in members["image"] for j, b in members["text"] if i != j]
            assert measured.between["image-text"][state] == pytest.approx(np.mean(across), abs=1e-7)


def test_norms_and_sinks_equal_loops(model: Any, inputs: dict[str, Any], samples: Any) -> None:
    result = measure(model, inputs, sites=SITES)
    assert (result.samples, result.perceptual_first) == (5, 0.2)
    assert {k: g.samples for k, g in result.sites["stream"].kinds.items()} == {"image": 4, "text": 5}
    seen_sinks = 0
    for site in SITES:
        for state in range(len(samples[0][0][site])):
            first = [np.linalg.norm(x[site][state][0]) for x, _ in samples]
            assert result.sites[site].first_norm[state] == pytest.approx(np.mean(first), rel=1e-6)
            for kind in ("image", "text"):
                norms: dict[str, list[float]] = {"median": [], "mean": [], "max": [], "of_mean": []}
                sink_norms, count, highest = [], 0, 0.0
                for x, kinds in samples:
                    x_s = x[site][state]
                    length = np.linalg.norm(x_s, axis=1)
                    plain, sinks = pick(x_s, kinds, kind)
                    highest = max([highest, *length[kinds == kind]])
                    if plain:
                        count += int((kinds[1:] == kind).sum())
                        sink_norms += list(length[sinks])
                        for name, value in {
                            "median": np.median(length[plain]),
                            "mean": length[plain].mean(),
                            "max": length[plain].max(),
                            "of_mean": np.linalg.norm(x_s[plain].mean(axis=0)),
                        }.items():
                            norms[name].append(float(value))
                measured = result.sites[site].kinds[kind]
                for name, found in norms.items():
                    assert measured.norms[name][state].value == pytest.approx(np.mean(found), rel=1e-6), name
                assert measured.highest[state] == pytest.approx(highest, rel=1e-6)
                assert measured.sink_share[state] == pytest.approx(len(sink_norms) / count)
                seen_sinks += len(sink_norms)
                if sink_norms:
                    assert measured.sink_norm[state] == pytest.approx(np.mean(sink_norms), rel=1e-6)
                else:
                    assert np.isnan(measured.sink_norm[state])
    assert seen_sinks > 5


def test_change_follows_the_same_token(model: Any, inputs: dict[str, Any], samples: Any) -> None:
    result = measure(model, inputs, sites=("stream", "mlp"), offsets=(1, 2, 9))
    for site, kind, n in [("stream", "image", 1), ("stream", "text", 2), ("mlp", "image", 2)]:
        measured = values(result.sites[site].kinds[kind].change[n])
        expected = []
        for x, kinds in samples:
            tokens = [i for i in range(1, len(kinds)) if kinds[i] == kind]
            if tokens:
                states_ = x[site]
                expected.append(
                    [np.mean([cos(states_[s][i], states_[s + n][i]) for i in tokens]) for s in range(len(states_) - n)]
                )
        np.testing.assert_allclose(measured, np.mean(expected, axis=0), atol=1e-6)
        assert 9 not in result.sites[site].kinds[kind].change


def test_published_change_compares_strangers(model: Any, inputs: dict[str, Any], samples: Any) -> None:
    result = measure(model, inputs, change="all_pairs")
    for kind in ("image", "text"):
        x = [
            s["stream"][:, [i for i in range(1, len(kinds)) if kinds[i] == kind]]
            for s, kinds in samples
            if (kinds[1:] == kind).any()
        ]
        shared = min(len(s[0]) for s in x)
        expected = [
            np.mean([np.mean([cos(a[s][k], b[s + 1][k]) for k in range(shared)]) for a in x for b in x])
            for s in range(3)
        ]
        np.testing.assert_allclose(values(result.sites["stream"].kinds[kind].change[1]), expected, atol=1e-6)


def test_projection_shows_kept_means(model: Any, inputs: dict[str, Any], samples: Any) -> None:
    result = measure(model, inputs, projected=(-1,))
    (projection,) = result.projections
    assert projection.state == 3
    assert (projection.kinds.count("text"), projection.kinds.count("image")) == (5, 4)
    points = np.array(projection.points)
    centres = []
    for x, kinds in samples:
        for kind in ("text", "image"):
            plain, _ = pick(x["stream"][3], kinds, kind)
            if plain:
                centres.append(x["stream"][3][plain].mean(axis=0))
    spread = np.linalg.svd(np.array(centres) - np.mean(centres, axis=0), compute_uv=False)[:2]
    np.testing.assert_allclose(np.linalg.norm(points, axis=0), spread, rtol=1e-4)
    both = measure(model, inputs, projected=(0,), projection="tsne").projections[0]
    assert np.isfinite(both.points).all()


def test_pca_is_the_plane_of_largest_variance() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 9))
    points = to_plane(plane)
    distances = np.linalg.norm(plane[:, None] - plane, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points, axis=-1), distances, atol=1e-9)
    with pytest.raises(UsageError, match="too few"):
        to_plane(plane[:2])


@pytest.mark.parametrize(
    "option",
    [{"of": "rows"}, {"change": "some"}, {"offsets": (0,)}, {"sink_factor": 1.0}, {"projection": "umap"}],
)
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Geometry(**option)


def test_a_layer_that_is_left_out_is_told(inputs: dict[str, Any]) -> None:
    model = deep(layers=3, sliding=False).double()
    model.model.language_model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(SeamError, match="mlp was seen in 2 of 3 states"):
        measure(model, inputs, sites=("mlp",))


def test_a_prompt_of_one_row_has_nothing_to_place(model: Any) -> None:
    probe = Geometry()
    with probe.on(model), torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert probe.result().samples == 1
