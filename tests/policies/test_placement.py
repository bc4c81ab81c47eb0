"""Where policies stand: at the forward of layers, beside what others put there, and without a trace afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.policies import Policy, Skip, Withdraw
from alula.seam import taps
from tests import zoo
from tests.grafts.common import run
from tests.policies.test_withdraw import LAYERS, LAYOUTS

POLICIES: dict[str, Policy] = {
    "withdraw": Withdraw(layer=1),
    "skip": Skip(part="mlp"),
    "own keys": Skip(part="block", layers=(1,), keys="own"),
}


def forwards(model: nn.Module) -> list[str]:
    """The modules whose forward is not their class's own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


class Mover(ModelHook):
    """As accelerate moves weights in and out: around what stood at the layer's forward."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.given.append(args[0].shape[1])
        return args, kwargs


@pytest.mark.parametrize("case", POLICIES)
def test_nothing_is_left_behind(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    before = run(model, "llava-llama", inputs)
    with POLICIES[case].on(model):
        run(model, "llava-llama", inputs)
        assert forwards(model)
    assert forwards(model) == []
    assert torch.equal(run(model, "llava-llama", inputs), before)


@pytest.mark.parametrize("order", ["before", "inside", "outlives"])
@pytest.mark.parametrize("case", POLICIES)
def test_accelerates_hooks_stay_where_they_are(case: str, order: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    bare, layer, hook = run(model, "llava-llama", inputs), Anatomy.of(model).layers[1], Mover()
    with POLICIES[case].on(model):
        expected = run(model, "llava-llama", inputs)
    if order == "before":
        add_hook_to_module(layer, hook)
    with POLICIES[case].on(model):
        if order != "before":
            add_hook_to_module(layer, hook)
        assert torch.equal(run(model, "llava-llama", inputs), expected)
        assert hook.given
        if order == "inside":
            remove_hook_from_module(layer)
    assert torch.equal(run(model, "llava-llama", inputs), bare)
    if order != "inside":
        remove_hook_from_module(layer)
        assert torch.equal(run(model, "llava-llama", inputs), bare)


@pytest.mark.parametrize("case", POLICIES)
def test_a_copy_is_bare_and_takes_a_policy_of_its_own(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    bare = run(model, "llava-llama", inputs)
    with POLICIES[case].on(model):
        expected = run(model, "llava-llama", inputs)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, "llava-llama", inputs), bare)
        with POLICIES[case].on(twin):
            assert torch.equal(run(twin, "llava-llama", inputs), expected)
        with torch.no_grad():
            Anatomy.of(model).layers[1].get_submodule("mlp.down_proj").weight.zero_()
        with POLICIES[case].on(twin):  # the copy runs its own layers
            assert torch.equal(run(twin, "llava-llama", inputs), expected)


def test_layers_begin_and_end_with_all_tokens_and_have_those_with_work_inside() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2I2")
    seen: dict[tuple[str, int], int] = {}

    def look(event: Any) -> None:
        seen[event.point, event.layer] = event.hidden.shape[1]
        assert event.tokens.shape == event.hidden.shape[:2]

    points = ["block_input", "attention_norm", "attention", "mlp_input", "mlp", "block_output"]
    with Withdraw(layer=1).on(model), taps(model, points, look):
        run(model, "llava-llama", inputs)
    for (point, layer), count in seen.items():
        assert count == (7 if layer and not point.startswith("block") else 15)


def test_hidden_states_are_of_all_tokens() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2I2")
    with Withdraw(layer=1).on(model), torch.no_grad():
        states: tuple[Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    image = inputs["input_ids"] == zoo.IMAGE
    assert {state.shape[1] for state in states} == {15}
    assert torch.equal(states[1][image], states[3][image])
    assert not torch.equal(states[0][image], states[1][image])


def test_compiled_it_is_the_same() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    with Skip(part="block", layers=(1,), keys="own").on(model), Withdraw(layer=3).on(model):
        expected = run(model, "llava-llama", inputs)
        torch._dynamo.reset()
        decoder = Anatomy.of(model).decoder
        decoder.compile(backend="eager")
        torch.testing.assert_close(run(model, "llava-llama", inputs), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", POLICIES)
def test_under_autocast(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    with POLICIES[case].on(model):
        whole = run(model, "llava-llama", inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = run(model, "llava-llama", inputs)
    valid = inputs["attention_mask"].bool()
    assert (half.float() - whole)[valid].abs().mean() < 0.1 * whole[valid].abs().mean()
