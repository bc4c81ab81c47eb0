"""The vocabulary lens against softmaxes, entropies and divergences taken token by token in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from alula.errors import UsageError
from alula.probes import VocabularyLens
from tests import zoo
from tests.probes.models import batch, double, singles, states

LAYOUTS = ("3I4I2", "2I5", "1I6", "7", "I3")


@pytest.fixture(scope="module")
def samples(model: Any, inputs: dict[str, Any]) -> Any:
    """Per sample {kind: (N, n, V)} distributions of its tokens but the first."""
    found = []
    for sample in singles(inputs):
        with torch.no_grad():
            stream = torch.from_numpy(states(model, sample)["stream"])
            q = torch.softmax(model.lm_head(model.model.language_model.norm(stream)), dim=-1).numpy()
        ids = sample["input_ids"][0].tolist()
        places = {
            "image": [i for i, t in enumerate(ids) if i and t == zoo.IMAGE],
            "text": [i for i, t in enumerate(ids) if i and t != zoo.IMAGE],
        }
        found.append({kind: q[:, rows] for kind, rows in places.items() if rows})
    return found


def measure(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    probe = VocabularyLens(**{"tokens_per_kind": 16, **options})  # by default every token of these short samples
    with probe.on(model), torch.no_grad():
        model(**inputs)
    return probe.result()


def entropy(q: np.ndarray) -> float:
    return -sum(p * np.log(p) for p in q)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def values(curve: Any) -> list[float]:
    return [estimate.value for estimate in curve]


def test_kinds_equal_row_by_row(model: Any, inputs: dict[str, Any], samples: Any) -> None:
    result = measure(model, inputs)
    assert result.states == (0, 1, 2, 3)
    assert result.vocabulary == zoo.VOCAB
    for kind, measured in result.kinds.items():
        mine = [s[kind] for s in samples if kind in s]
        assert measured.samples == len(mine)
        assert measured.rows == sum(q.shape[1] for q in mine)
        expected = [np.mean([np.mean([entropy(row) for row in q[s]]) for q in mine]) for s in range(4)]
        np.testing.assert_allclose(values(measured.entropy), expected, atol=1e-6)
        change = [
            np.mean([np.mean([kl(a, b) for a, b in zip(q[s], q[s + 1], strict=True)]) for q in mine]) for s in range(3)
        ]
        np.testing.assert_allclose(values(measured.change), change, atol=1e-6)
        for state in range(4):
            shares: Counter[int] = Counter()
            for q in mine:
                for row in q[state]:
                    shares[int(row.argmax())] += 1 / q.shape[1] / len(mine)
            token, share = measured.top[state][0]
            assert share == pytest.approx(max(shares.values()))
            assert shares[token] == pytest.approx(share)


def test_divergences_equal_loops_over_pairs(model: Any, inputs: dict[str, Any], samples: Any) -> None:
    result = measure(model, inputs)
    assert set(result.divergence) == {"image||text", "text||image"}
    for key, measured in result.divergence.items():
        a, b = key.split("||")
        for state in range(4):
            mean = {k: np.mean([s[k][state].mean(axis=0) for s in samples if k in s], axis=0) for k in (a, b)}
            cell = [
                [np.mean([kl(p, q) for p in x[a][state] for q in y[b][state]]) for y in samples if b in y]
                for x in samples
                if a in x
            ]
            own = [np.mean([kl(p, q) for p in s[a][state] for q in s[b][state]]) for s in samples if a in s and b in s]
            middle = (mean[a] + mean[b]) / 2
            js = (kl(mean[a], middle) + kl(mean[b], middle)) / 2
            assert measured.all_pairs[state] == pytest.approx(np.mean(cell), abs=1e-5)
            assert measured.matched[state].value == pytest.approx(np.mean(own), abs=1e-5)
            assert measured.jensen_shannon[state] == pytest.approx(js, abs=1e-6)


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_last_state_is_what_the_host_says(name: str) -> None:
    model, inputs = zoo.build(name), batch(name, "3I4")
    probe = VocabularyLens(states=(-1,), tokens_per_kind=64, top=3, skip_first=False)
    with probe.on(model), torch.no_grad():
        q = torch.softmax(model(**inputs).logits[0], dim=-1)
    for example in probe.result().examples:
        for position, (tokens,), (shares,) in zip(example.positions, example.tokens, example.shares, strict=True):
            assert shares == pytest.approx(q[position].topk(3).values.tolist(), abs=1e-5)
            assert q[position][list(tokens)].tolist() == pytest.approx(list(shares), abs=1e-5)


def test_a_bounded_number_of_evenly_spaced_rows_is_read(model: Any) -> None:
    result = measure(model, double(zoo.batch("llava-qwen3", "2I9I3")), tokens_per_kind=3, examples=1)
    positions = {example.kind: example.positions for example in result.examples}
    text, image = [1, *range(6, 15), 19, 20, 21], [*range(2, 6), *range(15, 19)]
    assert positions["text"] == tuple(text[i * 13 // 3] for i in range(3))
    assert positions["image"] == tuple(image[i * 8 // 3] for i in range(3))
    assert result.kinds["text"].rows == 3


def test_many_samples_are_read_some_at_a_time(model: Any) -> None:
    batches = [double(zoo.batch("llava-qwen3", *["3I20", "I24"] * 8, seed=seed)) for seed in range(2)]
    names = batches[0]
    both = {name: torch.cat([inputs[name] for inputs in batches]) for name in names}
    apart = VocabularyLens(tokens_per_kind=16)
    with apart.on(model), torch.no_grad():
        for inputs in batches:
            model(**inputs)
    one, other = measure(model, both), apart.result()
    for kind, found in one.kinds.items():
        np.testing.assert_allclose(values(found.entropy), values(other.kinds[kind].entropy), rtol=1e-9)
        np.testing.assert_allclose(values(found.change), values(other.kinds[kind].change), rtol=1e-9)
    for pair, divergence in one.divergence.items():
        np.testing.assert_allclose(divergence.all_pairs, other.divergence[pair].all_pairs, rtol=1e-9)
        np.testing.assert_allclose(values(divergence.matched), values(other.divergence[pair].matched), rtol=1e-9)


def test_examples_can_be_read(model: Any) -> None:
    result = measure(model, double(zoo.batch("llava-qwen3", "2I3")), states=(0, -1), examples=1)

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"w{ids[0]}"

    image = next(e for e in result.examples if e.kind == "image")
    lines = image.table(Tokenizer(), result.states).splitlines()
    assert lines[0].split() == ["image", "token", "state", "0", "state", "3"]
    assert len(lines) == 5
    assert lines[1].startswith("2 ")
    assert f"w{image.tokens[0][0][0]} {100 * image.shares[0][0][0]:.0f}%" in lines[1]


@pytest.mark.parametrize("option", [{"sites": ("mlp",)}, {"top": 0}, {"text": "words"}, {"states": (9,)}])
def test_options_are_checked(model: Any, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        measure(model, double(zoo.batch("llava-qwen3", "2I3")), **option)
