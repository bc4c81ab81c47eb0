"""Which engine computes a forward, and that two of them compute the same."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import alula
from alula import WingsConfig
from alula.grafts.wings.decode import DecodeEngine
from alula.grafts.wings.learners import Engine
from alula.grafts.wings.prefill import PrefillEngine
from alula.grafts.wings.published import PublishedEngine
from alula.seam import NAME
from tests import zoo
from tests.grafts.common import CONFIGS, grafted, wake

HOST = "llava-llama"
SHORT, LONG = "1I2", "2I9I9I7"


def engines_of(model: Any, inputs: dict[str, Any], *, grad: bool = False) -> tuple[set[type], Tensor]:
    """The engines that one forward made, and its logits."""
    made: set[type] = set()

    def collect(layer: object, args: object, kwargs: dict[str, Any]) -> None:
        made.update(type(value) for value in kwargs[NAME].memo.values() if isinstance(value, Engine))

    handle = model.model.language_model.layers[-1].self_attn.register_forward_pre_hook(collect, with_kwargs=True)
    with torch.set_grad_enabled(grad):
        logits = model(**inputs).logits.detach()
    handle.remove()
    return made, logits


@pytest.mark.parametrize("config", CONFIGS)
def test_decoding_and_prefilling_compute_the_same(config: str) -> None:
    model, _ = grafted(HOST, config)
    inputs = zoo.batch(HOST, SHORT)
    few, decoded = engines_of(model, inputs)
    many, prefilled = engines_of(model, inputs, grad=True)
    assert few == {DecodeEngine}
    assert many == {PrefillEngine}
    torch.testing.assert_close(decoded, prefilled, atol=2e-5, rtol=1e-4)


OTHERWISE: dict[str, dict[str, Any]] = {
    "rank": {"rank": 2},
    "cache": {"cache": "keys"},
    "rank and cache": {"rank": 2, "cache": "keys"},
    "rope": {"rope": False},
    "normalize": {"normalize": True},
    "gate": {"gate": "paper"},
    "router": {"router": "constant"},
    "query": {"query": "block_input"},
    "learners": {"learners": ("visual",)},
    "layers": {"layers": (-1,)},
}


@pytest.mark.parametrize("host", [HOST, "llava-gemma3"])
@pytest.mark.parametrize("cache", ["factors", "keys"])
@pytest.mark.parametrize("setting", OTHERWISE)
def test_two_grafts_of_one_model_compute_each_its_own(
    setting: str, cache: Literal["factors", "keys"], host: str
) -> None:
    """They share what is common to them, and only that, whichever of the two comes first."""
    one = WingsConfig(rank=4, router="mass", cache=cache)
    other = one.model_copy(update=OTHERWISE[setting])
    inputs = zoo.batch(host, SHORT)
    for first, second in ((one, other), (other, one)):
        model, _ = grafted(host, first, name="first")
        wake(alula.attach(model, second, "second"), seed=3)
        few, decoded = engines_of(model, inputs)
        many, prefilled = engines_of(model, inputs, grad=True)
        assert (few, many) == ({DecodeEngine}, {PrefillEngine})
        torch.testing.assert_close(decoded, prefilled, atol=5e-5, rtol=1e-4)


def test_many_queries_are_prefilled() -> None:
    model, _ = grafted(HOST)
    assert engines_of(model, zoo.batch(HOST, LONG))[0] == {PrefillEngine}


@pytest.mark.parametrize("config", CONFIGS)
def test_they_do_where_images_stand_in_many_ways(config: str) -> None:
    model, _ = grafted(HOST, config)
    inputs = zoo.batch(HOST, "1I2", "2I1")
    few, decoded = engines_of(model, inputs)
    many, prefilled = engines_of(model, inputs, grad=True)
    assert (few, many) == ({DecodeEngine}, {PrefillEngine})
    torch.testing.assert_close(decoded, prefilled, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", [SHORT, "2I30"])
def test_released_weights_have_an_engine_of_their_own(layout: str) -> None:
    model, _ = grafted(HOST, WingsConfig(compat="published", rank=4, router_tokens=96))
    assert engines_of(model, zoo.batch(HOST, layout))[0] == {PublishedEngine}


def test_without_an_image_there_is_nothing_to_compute() -> None:
    model, _ = grafted(HOST)
    assert engines_of(model, zoo.batch(HOST, "5"))[0] == set()


STEP = torch.tensor([[7]])


@pytest.mark.parametrize("config", ["mass", "keys kept", "outputs kept"])
@pytest.mark.parametrize("prompt", ["with gradients", "of text", "before the change"])
def test_steps_go_by_the_parameters_as_they_are(prompt: str, config: str) -> None:
    """Matrices that were put together for an earlier prompt are no part of them, whatever came between."""

    def logits(*, has_run: bool) -> Tensor:
        model, graft = grafted(HOST, config)
        if has_run:
            with torch.no_grad():
                model(**zoo.batch(HOST, LONG))
        if prompt != "before the change":
            wake(graft, seed=5)
        with torch.set_grad_enabled(prompt == "with gradients"):
            first = zoo.batch(HOST, "9" if prompt == "of text" else LONG)
            cache = model(**first, use_cache=True).past_key_values
        step: dict[str, Any] = {"input_ids": STEP}
        if prompt == "of text":
            step = {name: value for name, value in zoo.batch(HOST, "1I1").items() if name != "attention_mask"}
        if prompt == "before the change":
            wake(graft, seed=5)
            if not has_run:
                with torch.no_grad():
                    model(**zoo.batch(HOST, LONG))
        with torch.no_grad():
            return model(**step, past_key_values=cache).logits

    torch.testing.assert_close(logits(has_run=True), logits(has_run=False))


@pytest.mark.parametrize("config", ["mass", "keys kept", "outputs kept"])
@pytest.mark.parametrize("trained", ["before a prompt of text", "behind the prompt", "when gradients were there"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_steps_go_by_what_an_optimizer_left(fused: bool, trained: str, config: str) -> None:
    """Also by what one changes without torch counting it, as its fused ones do."""

    def logits(*, is_counted: bool) -> Tensor:
        model, graft = grafted(HOST, config)
        optimizer = torch.optim.AdamW(graft.parameters(), lr=0.1, fused=fused)

        def see_gradients() -> None:
            model(**zoo.batch(HOST, LONG)).logits.square().mean().backward()

        def train() -> None:
            optimizer.step()
            optimizer.zero_grad()
            if is_counted:
                with torch.no_grad():
                    for parameter in graft.parameters():
                        parameter.add_(0)

        with torch.no_grad():
            model(**zoo.batch(HOST, LONG))
        if trained != "behind the prompt":
            see_gradients()
        if trained == "before a prompt of text":
            train()
        with torch.no_grad():
            prompt = zoo.batch(HOST, "9" if trained == "before a prompt of text" else LONG)
            cache = model(**prompt, use_cache=True).past_key_values
        if trained == "behind the prompt":
            see_gradients()
        if trained != "before a prompt of text":
            train()
        turn = {name: value for name, value in zoo.batch(HOST, "1I1").items() if name != "attention_mask"}
        given = turn if trained == "before a prompt of text" else {"input_ids": STEP}
        with torch.no_grad():
            return model(**given, past_key_values=cache).logits

    assert torch.equal(logits(is_counted=False), logits(is_counted=True))
