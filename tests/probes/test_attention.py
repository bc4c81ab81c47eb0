"""Attention shift against attention matrices that are written out and summed one by one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import alula
from alula import WingsConfig
from alula.errors import UsageError
from alula.probes import AttentionShift, Resampling
from alula.tokens import Role, TokenMap
from tests import zoo
from tests.probes.models import LAYOUTS, batch, deep, double, singles


def written_out(model: Any, inputs: dict[str, Any]) -> list[tuple[np.ndarray, list[int]]]:
    """Per sample: (L, H, Q, K) attention over its tokens, from eager attention in float64, and its token ids."""
    model.double().set_attn_implementation("eager")
    pairs = []
    for sample in singles(double(inputs)):
        with torch.no_grad():
            attentions = torch.cat(model(**sample, output_attentions=True).attentions)
        pairs.append((attentions.numpy(), sample["input_ids"][0].tolist()))
    return pairs


def naive_curves(attention: np.ndarray, ids: list[int], queries: str = "all") -> dict[str, np.ndarray]:
    """{segment: (L, H)}, key by key."""
    image = [i for i, token in enumerate(ids) if token == zoo.IMAGE]
    place = {
        "before": [i for i in range(len(ids)) if i < image[0]],
        "image": image,
        "between": [i for i in range(image[0], image[-1]) if i not in image],
        "after": [i for i in range(len(ids)) if i > image[-1]],
        "all": list(range(len(ids))),
    }
    asked = place[queries]
    curves = {}
    for segment in ("before", "image", "between", "after"):
        mass = np.zeros(attention.shape[:2])
        for q, k in itertools.product(asked, place[segment]):
            mass += attention[:, :, q, k]
        curves[segment] = mass / len(asked)
    return curves


def naive_shift(before: np.ndarray, after: np.ndarray) -> float:
    return 1 - np.corrcoef(before, after)[0, 1]


def values(curve: Any) -> np.ndarray:
    return np.array([estimate.value for estimate in curve])


def measure(model: Any, inputs: dict[str, Any], **options: Any) -> AttentionShift:
    probe = AttentionShift(**options)
    with probe.on(model), torch.no_grad():
        model(**inputs)
    return probe


@pytest.mark.parametrize("name", zoo.ALL)
def test_curves_equal_written_out_attention(name: str) -> None:
    inputs = batch(name, *LAYOUTS)
    result = measure(zoo.build(name), inputs).result()
    naive = [naive_curves(a, ids) for a, ids in written_out(zoo.build(name), inputs) if zoo.IMAGE in ids]
    assert (result.samples, result.without_image) == (3, 1)
    for segment, curve in result.curves["main"].items():
        expected = np.mean([curves[segment].mean(axis=1) for curves in naive], axis=0)
        np.testing.assert_allclose(values(curve), expected, atol=2e-6)
    np.testing.assert_allclose(sum(values(curve) for curve in result.curves["main"].values()), 1, atol=1e-6)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return zoo.batch("llava-qwen3", "3I4I2", "2I5", "4I6", "3I2I1I5", side="right")


@pytest.fixture(scope="module")
def naive(inputs: dict[str, Any]) -> Any:
    pairs = written_out(deep(), inputs)
    return lambda queries="all": [naive_curves(a, ids, queries) for a, ids in pairs]


@pytest.mark.parametrize("queries", ["all", "after"])
def test_shift_equals_its_definition(inputs: dict[str, Any], naive: Any, queries: str) -> None:
    samples = naive(queries)
    mean = {s: [c[s].mean(axis=1) for c in samples] for s in ("before", "after")}
    per_head = [[naive_shift(c["before"][:, h], c["after"][:, h]) for h in range(4)] for c in samples]
    expected = {
        ("samples", "mean"): np.mean([naive_shift(b, a) for b, a in zip(mean["before"], mean["after"], strict=True)]),
        ("curves", "mean"): naive_shift(np.mean(mean["before"], axis=0), np.mean(mean["after"], axis=0)),
        ("samples", "each"): np.mean(per_head),
    }
    model = deep().double()
    for (average, heads), value in expected.items():
        result = measure(model, double(inputs), queries=queries, average=average, heads=heads).result()
        assert result.shift["main"].value == pytest.approx(value, abs=1e-5)
        if heads == "each":
            np.testing.assert_allclose(values(result.per_head), np.mean(per_head, axis=0), atol=1e-5)


def test_a_curve_that_cannot_vary_has_no_shift(inputs: dict[str, Any]) -> None:
    result = measure(deep(), inputs, queries="image").result()  # image tokens cannot see the text after them
    assert result.undefined == result.samples == 4
    assert np.isnan(result.shift["main"].value)
    assert result.to_dict()["shift"]["main"] == {"value": None, "low": None, "high": None}


def test_without_text_on_a_side_there_is_no_shift() -> None:
    whole = measure(deep(), zoo.batch("llava-qwen3", "I4", "3I", "3I4"))
    alone = measure(deep(), singles(zoo.batch("llava-qwen3", "I4", "3I", "3I4"))[2])
    assert (whole.result().samples, whole.result().undefined) == (3, 2)
    assert whole.result().shift["main"].value == pytest.approx(alone.result().shift["main"].value, abs=1e-4)


def test_between_can_count_as_after(inputs: dict[str, Any], naive: Any) -> None:
    curves = measure(deep(), inputs, between="after").result().curves["main"]
    expected = np.mean([(c["between"] + c["after"]).mean(axis=1) for c in naive()], axis=0)
    assert "between" not in curves
    np.testing.assert_allclose(values(curves["after"]), expected, atol=2e-6)


def test_system_rows_can_stand_apart(naive: Any) -> None:
    inputs = zoo.batch("llava-qwen3", "5I4")
    pairs = written_out(deep(), inputs)
    roles = torch.tensor([[Role.SYSTEM] * 2 + [Role.USER] * 11])
    kinds = (inputs["input_ids"] == zoo.IMAGE).long()
    tokens = TokenMap.from_modalities(kinds, roles=roles)
    curves = measure(deep(), inputs | {"token_map": tokens}, system="apart").result().curves["main"]
    attention = pairs[0][0].mean(axis=1)
    np.testing.assert_allclose(values(curves["system"]), attention[:, :, :2].sum(axis=(1, 2)) / 13, atol=2e-6)
    np.testing.assert_allclose(values(curves["before"]), attention[:, :, 2:5].sum(axis=(1, 2)) / 13, atol=2e-6)
    with pytest.raises(UsageError, match="nothing says which tokens"):
        measure(deep(), inputs, system="apart")


def test_intervals_hold_the_value_and_narrow(inputs: dict[str, Any]) -> None:
    probe = AttentionShift()
    model = deep()
    widths = []
    with probe.on(model), torch.no_grad():
        for seed in range(8):
            model(**zoo.batch("llava-qwen3", "3I4", "2I5", "4I6", seed=seed))
            if seed in (1, 7):
                shift = probe.result(Resampling(resamples=400)).shift["main"]
                assert shift.low <= shift.value <= shift.high
                widths.append(shift.high - shift.low)
    assert widths[1] < widths[0]


def test_half_precision_agrees(inputs: dict[str, Any]) -> None:
    full = measure(deep(), inputs).result().curves["main"]
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    rough = measure(deep().bfloat16(), half).result().curves["main"]
    np.testing.assert_allclose(values(rough["image"])[0], values(full["image"])[0], atol=0.02)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_attention_is_read_and_left_alone(inputs: dict[str, Any], implementation: str) -> None:
    expected = measure(deep(), inputs).result()
    model = deep()
    zoo.set_attention(model, implementation)
    with torch.no_grad(), zoo.uncompiled():
        before = model(**inputs).logits
        with (probe := AttentionShift()).on(model):
            during = model(**inputs).logits
        assert model.config.text_config._attn_implementation == implementation
        assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(during, before)
    for segment, curve in expected.curves["main"].items():
        np.testing.assert_allclose(values(probe.result().curves["main"][segment]), values(curve), atol=1e-5)


@pytest.mark.parametrize("grafted", [False, True])
def test_attention_maps_beside_a_probe(inputs: dict[str, Any], grafted: bool) -> None:
    """`output_attentions` gives what it gives without alula: the decoder's own maps."""
    model = deep()
    zoo.set_attention(model, "eager")
    with torch.no_grad():
        before = model(**inputs, output_attentions=True).attentions
        if grafted:
            alula.attach(model, WingsConfig(rank=4))
        with AttentionShift().on(model):
            during = model(**inputs, output_attentions=True).attentions
    assert len(during) == len(before) == model.config.text_config.num_hidden_layers
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(during, before, strict=True))


@pytest.mark.parametrize("option", [{"queries": "some"}, {"heads": "max"}, {"portion": -1.0}, {"keep": 0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        measure(deep(layers=2), zoo.batch("llava-qwen3", "3I4"), **option)
