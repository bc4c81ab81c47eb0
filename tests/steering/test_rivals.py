"""The rivals behind the same door, each against an independent computation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alula
from alula.errors import HostError, UsageError
from alula.seam import find, generation_extras
from alula.steering import Distorted, Hidden, KeyDirections, noised
from tests import zoo
from tests.steering import oracle
from tests.steering.test_highlight import given, marked


@pytest.mark.parametrize("name", ["qwen3", "mistral", "llava-llama", "qwen2_5_vl"])
@torch.no_grad()
def test_what_is_hidden(name: str) -> None:
    """The second run computes without the highlighted keys."""
    layouts = ("9", "5") if name in zoo.TEXT else ("3I4", "2I1")
    model, inputs = zoo.build(name), zoo.batch(name, *layouts)
    marks, valid = marked(inputs, (1, 5), (5, 7)), inputs["attention_mask"].bool()
    one = torch.log_softmax(oracle.run(model, inputs, 0 * marks), dim=-1)
    other = torch.log_softmax(oracle.run(model, inputs, -1e6 * marks), dim=-1)
    expected = 1.5 * one - 0.5 * other
    barred = one < one.amax(dim=-1, keepdim=True) + math.log(0.2)
    with alula.highlight(model, guidance=1.5, by=Hidden(plausibility=0.2)):
        found = model(**given(inputs, marks)).logits
    sure = (one - one.amax(dim=-1, keepdim=True) - math.log(0.2)).abs() > 1e-3
    assert torch.equal(found[valid].isinf()[sure[valid]], barred[valid][sure[valid]])
    both = valid[..., None] & ~barred & ~found.isinf()
    torch.testing.assert_close(found[both], expected[both], atol=2e-4, rtol=1e-3)
    with alula.highlight(model, guidance=1.5, by=Hidden(plausibility=0)):
        found = model(**given(inputs, marks)).logits
    torch.testing.assert_close(found[valid], expected[valid], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llava-llama", "qwen2_5_vl"])
@torch.no_grad()
def test_distorted_pixels(name: str) -> None:
    """A whole answer equals one whose scores are made of two models' runs without caches."""
    model, inputs = zoo.build(name), zoo.batch(name, "3I4", "2I1")
    others = noised(inputs, 700)
    tokens = inputs["input_ids"][:, :0]
    for _step in range(5):
        runs = [oracle.extended(each, torch.zeros(inputs["input_ids"].shape), tokens)[0] for each in (inputs, others)]
        one, other = (torch.log_softmax(model(**run).logits[:, -1], dim=-1) for run in runs)
        scores = 2 * one - other
        scores[one < one.amax(dim=-1, keepdim=True) + math.log(0.1)] = -math.inf
        scores[:, model.generation_config.suppress_tokens] = -math.inf
        tokens = torch.cat([tokens, scores.argmax(dim=-1, keepdim=True)], dim=1)
    with alula.highlight(model, by=Distorted(others)):
        found = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
        with pytest.raises(UsageError, match="distorted inputs are of 2 samples"):
            model.generate(**inputs, max_new_tokens=5, num_beams=2)
    assert torch.equal(found, tokens)
    assert not torch.equal(found, model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:])
    assert find(model) is None


def test_noise_is_that_of_diffusion() -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    inputs = {"pixel_values": pixels, "input_ids": torch.zeros(1, 1)}
    x = np.linspace(-6, 6, 1000)
    kept = np.cumprod(1 - (1 / (1 + np.exp(-x)) * (0.5e-2 - 1e-5) + 1e-5))
    for step in (0, 500, 999):
        found = noised(inputs, step)["pixel_values"]
        correlation = np.corrcoef(found.flatten(), inputs["pixel_values"].flatten())[0, 1]
        assert abs(correlation - math.sqrt(kept[step])) < 0.02
        assert abs(float(found.var()) - 1) < 0.05
    assert torch.equal(noised(inputs, 10)["pixel_values"], noised(inputs, 10)["pixel_values"])


def keys_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(L, B, S, G, D) keys as their module makes them."""
    attention = model.model.layers[0].self_attn
    found: list[Tensor] = []
    handles = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, a, output: found.append(output))
        for layer in model.model.layers
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(found).unflatten(-1, (-1, attention.head_dim))


@torch.no_grad()
def test_directions_are_learned_by_singular_values() -> None:
    """Against numpy, head by head; all of the spectrum of the relevant prompt is no choice at all."""
    model, samples = zoo.build("qwen3"), []
    for seed in range(4):
        ids = [zoo.prompt(layout, seed) for layout in ("4", "7", "6")]
        for each in ids[1:]:
            each[-4:] = ids[0]
        samples.append(
            tuple(
                ({"input_ids": torch.tensor([each])}, torch.tensor([[0.0] * (len(each) - 4) + [1.0] * 4]))
                for each in ids
            )
        )
    found = KeyDirections.learned(model, samples, share=0.8).projections
    parts = [[keys_of(model, inputs)[:, 0, -4:].double().numpy() for inputs, _ in each] for each in samples]
    alone, relevant, irrelevant = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    for layer in range(2):
        for head in range(2):
            h = alone[layer, :, head]
            both = []
            for keys, is_first in ((relevant, True), (irrelevant, False)):
                u, s, _ = np.linalg.svd(h.T @ keys[layer, :, head] / len(h))
                count = int(np.searchsorted(np.cumsum(s) / s.sum(), 0.8)) + 1
                kept = u[:, :count] if is_first else u[:, count:]
                both.append(kept @ kept.T)
            np.testing.assert_allclose(found[layer, head], sum(both) / 2, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@torch.no_grad()
def test_keys_are_edited(name: str) -> None:
    """By a hook of the test's own; while generating, with and without a cache; bit for bit gone behind the block."""
    model, inputs = zoo.build(name), zoo.batch(name, "9", "5")
    marks, valid = marked(inputs, (1, 5), (5, 7)), inputs["attention_mask"].bool()
    plain, width = model(**inputs).logits, model.model.layers[0].self_attn.head_dim
    projections = torch.randn(2, 2, width, width, generator=torch.Generator().manual_seed(0))
    with alula.highlight(model, strength=0.7, by=KeyDirections(projections)):
        found = model(**given(inputs, marks)).logits
        with generation_extras(model, given(inputs, marks)) as extras:
            options = {"max_new_tokens": 6, "do_sample": False}
            tokens = [model.generate(**extras, **options, use_cache=use) for use in (True, False)]
    handles = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda m, a, output, p=projections[index]: (
                output
                + 0.7 * marks[..., None] * torch.einsum("bmgd,gde->bmge", output.unflatten(-1, (2, -1)), p).flatten(-2)
            )
        )
        for index, layer in enumerate(model.model.layers)
    ]
    expected = model(**inputs).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)
    assert float((found - plain)[valid].abs().max()) > 1e-2
    assert torch.equal(*tokens)
    assert not torch.equal(tokens[0], model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert torch.equal(model(**inputs).logits, plain)


def test_options_without_effect_are_refused() -> None:
    model = zoo.build("qwen3")
    directions = KeyDirections(torch.zeros(2, 2, 16, 16))
    inputs = zoo.batch("llava-llama", "3I4")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"by": Hidden(), "strength": 1.0}, "strength has no effect"),
        ({"by": Hidden(), "guidance": 1}, "guidance=1 has no effect"),
        ({"by": directions, "guidance": 2.0}, "guidance has no effect"),
        ({"by": directions, "strength": 0}, "does nothing"),
        ({"by": KeyDirections(torch.zeros(2, 2, 8, 8))}, "are not for this host"),
        ({"by": Distorted({"input_ids": 1})}, "no ids and pixels"),
        ({"by": Distorted(inputs, plausibility=2)}, "not in 0 to 1"),
    ]
    for options, message in cases:
        with pytest.raises(UsageError, match=message), alula.highlight(model, **options):
            pass
    with pytest.raises(UsageError, match="no pixels"):
        noised({"input_ids": 1})
    with pytest.raises(UsageError, match="not one of 0 to 999"):
        noised(inputs, 1000)
    with pytest.raises(UsageError, match="no samples"):
        KeyDirections.learned(model, [])
    with pytest.raises(HostError, match="no module of it makes keys alone"):
        KeyDirections.learned(zoo.build("phi3"), [])
    assert find(model) is None
