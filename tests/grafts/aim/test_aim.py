"""Fused tokens in forwards, against the host's own way to be given embeddings, and what AIM's map is at the start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import alula
from alula import AimConfig, WingsConfig
from alula.errors import HostError, UsageError
from alula.grafts.aim import FUSED, FUSED_AT, AimGraft
from alula.policies import Prune
from alula.seam import find, generation_extras
from alula.seam.dialect import cache_keyword
from tests import zoo
from tests.grafts.common import run, token_map, true_positions, wake

CACHE = cache_keyword()
ROTATING = tuple(name for name in zoo.TEXT if name not in ("opt", "gpt2"))
# what embeds and then scales in its model's forward: what its first layer is given is not what it takes as embeddings
SCALING = {"gemma2"}


def aim_on(model: Any, **settings: Any) -> AimGraft:
    graft = wake(alula.attach(model, AimConfig(**settings)))
    assert isinstance(graft, AimGraft)
    return graft


def shown(model: Any, inputs: dict[str, Tensor], *stretches: tuple[int, int], seed: int = 3) -> dict[str, Tensor]:
    """Further inputs: fused tokens of one stretch per sample."""
    batch, length = inputs["input_ids"].shape
    at = torch.zeros(batch, length, dtype=torch.bool)
    for sample, (start, stop) in enumerate(stretches):
        at[sample, start:stop] = True
    width = model.config.get_text_config().hidden_size
    fused = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    return {FUSED: fused, FUSED_AT: at}


def embedded(model: Any, inputs: dict[str, Tensor], further: dict[str, Tensor]) -> Tensor:
    """(B, S, d) the embeddings that a stock host would be given."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeddings[further[FUSED_AT]] = further[FUSED][further[FUSED_AT]]
    return embeddings


@pytest.mark.parametrize("name", [name for name in ROTATING if name not in SCALING])
def test_it_is_the_hosts_own_forward_over_embeddings(name: str) -> None:
    """To the bit, padded and unpadded."""
    model, inputs = zoo.build(name), zoo.batch(name, "9", "6")
    further = shown(model, inputs, (1, 5), (4, 8))
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = model(inputs_embeds=embedded(model, inputs, further), attention_mask=mask).logits
    aim_on(model)
    assert torch.equal(run(model, name, inputs, **further), expected)


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen3", "llava-gemma3", "gemma3_vl"])
def test_beside_a_picture_it_is_the_hosts_own_forward_over_embeddings(name: str) -> None:
    model, inputs = zoo.build(name), zoo.batch(name, "7I3", "5I2")
    further = shown(model, inputs, (1, 5), (3, 7))
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        expected = model(inputs_embeds=embedded(model, inputs, further), **others).logits
    aim_on(model)
    assert torch.equal(run(model, name, inputs, **further), expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_several_axes_count_fused_tokens_as_text(name: str) -> None:
    model, inputs = zoo.build(name), zoo.batch(name, "7I3")
    further = shown(model, inputs, (1, 5))
    told = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    positions, _ = model.model.get_rope_index(**{key: inputs[key] for key in told})
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        embeddings = embedded(model, inputs, further)
        expected = model(inputs_embeds=embeddings, position_ids=positions, **others).logits
    aim_on(model)
    torch.testing.assert_close(run(model, name, inputs, **further), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava-qwen3", "qwen2_5_vl"])
def test_without_fused_tokens_it_is_the_host_bit_for_bit(name: str) -> None:
    layouts = ("9", "6") if name in zoo.TEXT else ("7I3", "5")
    model, inputs = zoo.build(name), zoo.batch(name, *layouts)
    before = run(model, name, inputs)
    graft = aim_on(model)
    assert torch.equal(run(model, name, inputs), before)
    further = shown(model, inputs, (0, 0), (0, 0))
    assert torch.equal(run(model, name, inputs, **further), before)
    further = shown(model, inputs, (0, 3), (0, 0))
    assert not torch.equal(run(model, name, inputs, **further)[0], before[0])
    with graft.disabled():
        assert torch.equal(run(model, name, inputs, **further), before)
    alula.detach(model)
    assert torch.equal(run(model, name, inputs), before)


def test_no_token_depends_on_later_fused_ones() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "8I3")
    aim_on(model)
    further = shown(model, inputs, (2, 8))
    before = run(model, "llava-llama", inputs, **further)
    further[FUSED][:, 6:] += 1
    after = run(model, "llava-llama", inputs, **further)
    assert torch.equal(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("name", ["llama", "gemma3", "llava-mistral", "qwen2_5_vl"])
def test_cached_equals_uncached_whichever_way_tokens_are_drawn(name: str) -> None:
    layouts = ("9", "6") if name in zoo.TEXT else ("7I3", "5I2")
    model, inputs = zoo.build(name), zoo.batch(name, *layouts)
    aim_on(model)
    further = shown(model, inputs, (1, 5), (5, 8))
    bare = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for way in ({"do_sample": False}, {"do_sample": False, "num_beams": 2, "num_return_sequences": 2}):
        with generation_extras(model, {**inputs, **further}) as given:
            cached = model.generate(**given, **way, max_new_tokens=5)
            plain = model.generate(**given, **way, max_new_tokens=5, use_cache=False)
        assert torch.equal(cached, plain)
    with generation_extras(model, {**inputs, **further}) as given:
        greedy = model.generate(**given, max_new_tokens=5, do_sample=False)
    assert not torch.equal(greedy, bare)


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    """Fused tokens are told for the whole prompt, and each piece takes its own; drafted tokens come behind."""
    model, inputs = zoo.build("llama"), zoo.batch("llama", "9", "6")
    aim_on(model)
    further = shown(model, inputs, (1, 6), (4, 8))
    positions, mask = true_positions(inputs), inputs["attention_mask"]
    whole = run(model, "llama", inputs, **further, position_ids=positions)
    seam, cache, pieces = find(model), DynamicCache(config=model.config), []
    assert seam is not None
    with torch.no_grad(), seam.given_inputs(further):
        for start, stop in ((0, 4), (4, 7), (7, 9)):
            piece = {"input_ids": inputs["input_ids"][:, start:stop], "attention_mask": mask[:, :stop]}
            piece |= {"position_ids": positions[:, start:stop], CACHE: cache}
            pieces.append(model(**piece).logits)
    valid = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[valid], whole[valid], atol=5e-5, rtol=1e-4)
    shorter = {FUSED: further[FUSED][:, :8], FUSED_AT: further[FUSED_AT][:, :8]}
    assert torch.equal(run(model, "llama", inputs, **shorter, position_ids=positions), whole)


def test_it_stands_beside_wings_and_a_policy() -> None:
    """What else reads the first layer's input finds fused tokens there."""
    name = "llava-llama"
    inputs = zoo.batch(name, "7I3")
    further = shown(zoo.build(name), inputs, (1, 5))
    stock = zoo.build(name)
    wake(alula.attach(stock, WingsConfig(rank=4)))
    policy = Prune(stages=[(1, 0.5)])
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad(), policy.on(stock):
        embeddings = embedded(stock, inputs, further)
        expected = stock(inputs_embeds=embeddings, token_map=token_map(inputs), **others).logits
    model = zoo.build(name)
    wake(alula.attach(model, WingsConfig(rank=4)))
    aim_on(model)
    with policy.on(model):
        found = run(model, name, inputs, **further)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "llava-qwen3"])
def test_the_map_is_the_equation_and_starts_at_the_length_of_embeddings(name: str) -> None:
    model, inputs = zoo.build(name), zoo.batch(name, "9")
    graft = alula.attach(model, AimConfig())
    assert isinstance(graft, AimGraft)
    with torch.no_grad():
        fused = graft.map(graft.states(inputs))
        embeddings = model.get_input_embeddings()(torch.arange(zoo.VOCAB))
        torch.testing.assert_close(
            fused.square().mean().sqrt(), embeddings.square().mean().sqrt(), atol=1e-3, rtol=1e-3
        )
    wake(graft)
    with torch.no_grad():
        h = graft.states(inputs).double()
        w, b = (value.double() for value in graft.map.linear.parameters())
        mapped = h @ w.T + b
        centered = mapped - mapped.mean(-1, keepdim=True)
        gain, shift = (value.double() for value in graft.map.norm.parameters())  # type: ignore[union-attr]
        expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift
        torch.testing.assert_close(graft.map(graft.states(inputs)).double(), expected, atol=1e-4, rtol=1e-4)


def test_states_are_the_layers_own() -> None:
    """Of the last layer behind the final norm, of others as the layer gives them."""
    model, inputs = zoo.build("llava-llama", layers=4), zoo.batch("llava-llama", "3I2")
    with torch.no_grad():
        every = model(**inputs, output_hidden_states=True).hidden_states
    for layer, expected in ((-1, every[-1]), (1, every[2]), (-2, every[3]), (0, every[1])):
        graft = alula.attach(model, AimConfig(layer=layer, norm=False), "aim")
        assert isinstance(graft, AimGraft)
        torch.testing.assert_close(graft.states(inputs), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(graft.map(expected), expected), "without a norm it starts as the identity"
        alula.detach(model)


def test_a_copy_owns_its_map() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "6I2")
    graft = aim_on(model)
    twin = copy.deepcopy(model)
    other = alula.grafts_of(twin)["aim"]
    assert isinstance(other, AimGraft)
    states = graft.states(inputs)
    before = graft.map(states)
    assert torch.equal(other.map(other.states(inputs)), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(graft.map(states), before)
    assert not other.map(states).any()


def test_gradients_reach_the_map_alone() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "6I2")
    graft = aim_on(model)
    model.requires_grad_(False)
    for parameter in graft.parameters():
        parameter.requires_grad_(True)
    further = shown(model, inputs, (1, 5))
    further[FUSED] = graft.map(graft.states(inputs))
    model(**inputs, **further).logits.square().sum().backward()
    grown = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grown == {name for name, parameter in model.named_parameters() if ".alula.aim." in name}
    assert all(bool(parameter.grad.abs().sum()) for parameter in graft.parameters() if parameter.grad is not None)
    assert {id(each) for each in graft.parameters_by_part()["aim"]} == {id(each) for each in graft.parameters()}


def test_half_precision_stays_half() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "6I2")
    aim_on(model)
    further = shown(model, inputs, (1, 5))
    full = run(model, "llava-llama", inputs, **further)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    half = run(model.to(torch.bfloat16), "llava-llama", inputs, **further)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.1 * full.abs().mean()


def test_what_cannot_be_is_refused() -> None:
    for name in ("opt", "gpt2"):
        with pytest.raises(HostError, match="adds positions"):
            alula.attach(zoo.build(name), AimConfig())
    model, inputs = zoo.build("llama"), zoo.batch("llama", "6")
    with pytest.raises(UsageError, match="layer 9 does not exist"):
        alula.attach(model, AimConfig(layer=9))
    assert find(model) is None
    aim_on(model)
    further = shown(model, inputs, (1, 5))
    with pytest.raises(UsageError, match="fused tokens are told by"):
        model(**inputs, fused=further[FUSED])
    with pytest.raises(UsageError, match="16 wide, the host's stream 32"):
        model(**inputs, fused=further[FUSED][..., :16], fused_at=further[FUSED_AT])
