"""Withdrawal against the published computation, and against barring keys by masks over the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula.policies import Withdraw
from tests import zoo
from tests.grafts.common import CONFIGS, prompt_tokens, run, wake
from tests.policies.oracle import Left, masked

LAYERS = 4
HOSTS = (*zoo.ALL, "gpt2", "qwen3_moe", "gemma3_vl", "qwen3_vl")
LAYOUTS = ("3I2", "5", "I4I2")  # one image; none; two, the first in front of all text


def withdrawn(first: int) -> Left:
    return lambda layer, ids: (ids != zoo.IMAGE) | (layer < first)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("host", HOSTS)
def test_prefill_equals_the_masked_oracle(host: str, first: int, side: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS, side=side)
    with masked(model, withdrawn(first)):
        expected = run(model, host, inputs, use_cache=False)
    with Withdraw(layer=first).on(model):
        ours = run(model, host, inputs)
        uncached = run(model, host, inputs, use_cache=False)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])
    close(uncached[valid], expected[valid])
    if side == "left":
        plain = run(model, host, inputs)
        assert (ours[:, -1] - plain[:, -1]).abs().max() > 1e-3


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", HOSTS)
def test_generation_equals_the_masked_oracle(host: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 5}
    with masked(model, withdrawn(1)):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with Withdraw(layer=1).on(model), prompt_tokens(model, host, inputs):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_grafts_see_what_they_saw(config: str) -> None:
    """Wings' learners attend to the tokens of the whole forward, also in layers these were taken out of."""
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    wake(alula.attach(model, CONFIGS[config]))
    with masked(model, withdrawn(1)):
        expected = run(model, "llava-llama", inputs, use_cache=False)
    with Withdraw(layer=1).on(model):
        ours = run(model, "llava-llama", inputs)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    close(ours[text], expected[text])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("host", ["llava-llama", "llava-gemma3", "qwen2_5_vl"])
def test_training_under_it_gives_the_masked_oracles_gradients(host: str, *, checkpointing: bool) -> None:
    inputs = zoo.batch(host, *LAYOUTS)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    gradients = []
    for ours in (False, True):
        model = zoo.build(host, layers=LAYERS)
        if ours and checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with Withdraw(layer=1).on(model) if ours else masked(model, withdrawn(1)):
            model(**inputs, use_cache=False).logits[text].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-3, msg=name)
