"""Withdrawal against the published computation, and against barring keys by masks over the zoo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alula
from alula.anatomy import Anatomy
from alula.errors import HostError
from alula.policies import Skip, Withdraw
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
@pytest.mark.parametrize(
    ("host", "positions"),
    [("llava-llama", "keep"), ("llava-gemma3", "keep"), ("qwen2_5_vl", "keep"), ("llava-gemma3", "dense")],
)
def test_training_gives_the_masked_oracles_gradients(host: str, positions: Any, *, checkpointing: bool) -> None:
    inputs = zoo.batch(host, *LAYOUTS)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    gradients = []
    for ours in (False, True):
        model = zoo.build(host, layers=LAYERS)
        if ours and checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with ExitStack() as stack:
            if ours:
                stack.enter_context(Withdraw(layer=1, positions=positions).on(model))
            else:
                if positions == "dense":
                    stack.enter_context(renumbered(model, 1))
                stack.enter_context(masked(model, withdrawn(1)))
            model(**inputs, use_cache=False).logits[text].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-3, msg=name)


DENSE = tuple(host for host in HOSTS if host not in ("opt", "gpt2"))


@contextmanager
def renumbered(model: Any, first: int) -> Iterator[None]:
    """From a layer on, positions that count text alone; to be run without a cache."""
    anatomy, seen = Anatomy.of(model), {}

    def note(host: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["text"] = (kwargs["input_ids"] != zoo.IMAGE) & kwargs["attention_mask"].bool()

    def count(index: int) -> Any:
        kind = getattr(anatomy.config, "layer_types", None) if "gemma3" in anatomy.config.model_type else None

        def renumber(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            places = (seen["text"].cumsum(dim=1) - 1).clamp(min=0)
            if "mrope_section" in anatomy.config.rope_parameters:
                places = places.expand(3, -1, -1)
            told = {} if kind is None else {"layer_type": kind[index]}
            rotary: Any = anatomy.decoder.rotary_emb
            hidden = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, "position_embeddings": rotary(hidden, places, **told)}

        return renumber

    handles = [model.register_forward_pre_hook(note, with_kwargs=True)]
    handles += [
        anatomy.layers[index].register_forward_pre_hook(count(index), with_kwargs=True)
        for index in range(first, LAYERS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("host", DENSE)
def test_dense_positions_equal_the_masked_oracles(host: str, side: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS, side=side)
    with renumbered(model, 1), masked(model, withdrawn(1)):
        expected = run(model, host, inputs, use_cache=False)
    with Withdraw(layer=1, positions="dense").on(model):
        ours = run(model, host, inputs)
        uncached = run(model, host, inputs, use_cache=False)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])
    close(uncached[valid], expected[valid])
    with Withdraw(layer=1).on(model):
        kept = run(model, host, inputs)
    assert (kept - ours)[valid].abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", DENSE)
def test_generation_at_dense_positions_equals_the_masked_oracle(host: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 5}
    with renumbered(model, 1), masked(model, withdrawn(1)):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with Withdraw(layer=1, positions="dense").on(model), prompt_tokens(model, host, inputs):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours, expected)


def test_dense_positions_go_with_other_policies_and_leave_text_as_it_is() -> None:
    model, inputs, text = zoo.build("llama", layers=LAYERS), zoo.batch("llama", *LAYOUTS), zoo.batch("llama", "7", "4")
    dense, bare = Withdraw(layer=2, positions="dense"), run(model, "llama", text)
    with dense.on(model):
        assert torch.equal(run(model, "llama", text), bare)
        alone = run(model, "llama", inputs)
        with Withdraw(layer=3, positions="dense").on(model), Withdraw(layer=3).on(model):
            assert torch.equal(run(model, "llama", inputs), alone)
    for one, other in ((dense, Skip(part="mlp", layers=(1, 2))), (Skip(part="mlp", layers=(1, 2)), dense)):
        with one.on(model), other.on(model):
            both = run(model, "llama", inputs)
        with renumbered(model, 2), masked(model, withdrawn(2)), Skip(part="mlp", layers=(1,)).on(model):
            expected = run(model, "llama", inputs, use_cache=False)
        left = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
        close(both[left], expected[left])


@pytest.mark.parametrize("host", ["opt", "gpt2"])
def test_positions_that_are_added_once_cannot_be_dense(host: str) -> None:
    model = zoo.build(host, layers=LAYERS)
    with pytest.raises(HostError, match="has no rotary embedding"), Withdraw(layer=1, positions="dense").on(model):
        pass


def test_angles_that_go_by_the_longest_prompt_cannot_be_dense() -> None:
    model = zoo.build("llama", layers=LAYERS)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(HostError, match="dynamic scaling"), Withdraw(layer=1, positions="dense").on(model):
        pass
