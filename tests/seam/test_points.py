"""What stands at a point of a layer runs in order of phases, whatever was attached first."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alula
from alula import WingsConfig
from alula.errors import AlulaError, HostError, UsageError
from alula.seam import InputOf, LayerView, Phase, Point, Seam, find, install, taps
from tests import zoo
from tests.grafts.common import wake

BLOCK_INPUT = WingsConfig(rank=4, router="constant", query="block_input")


def steer(model: Any, layer: int = 1) -> Seam:
    """Shift the stream that enters a layer."""

    def shift(view: LayerView, hidden: Tensor) -> Tensor:
        return hidden + view.tokens.is_perceptual[..., None] * 0.5

    seam = install(model, "steering")
    seam.on(Point.BLOCK_INPUT, layer, shift, phase=Phase.EDIT, owner="steering")
    return seam


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["llava-llama", "llava-gemma3"])
def test_order_of_attachment_does_not_matter(name: str, layer: int) -> None:
    batch = zoo.batch(name, "3I4", "2I1")

    def logits(*, graft_first: bool) -> tuple[Tensor, Tensor]:
        model = zoo.build(name)
        if not graft_first:
            steer(model, layer)
        wake(alula.attach(model, BLOCK_INPUT))
        if graft_first:
            steer(model, layer)
        seen: list[Any] = []
        with torch.no_grad(), taps(model, ["block_input"], seen.append, layers=[layer]):
            return model(**batch).logits, seen[0].hidden

    ours, theirs = logits(graft_first=True), logits(graft_first=False)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    model = zoo.build(name)
    wake(alula.attach(model, BLOCK_INPUT))
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, ours[0])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("point", [point for point in Point if point is not Point.ATTENTION_NORM])
def test_an_edit_reaches_readers_and_gradients_also_under_checkpointing(name: str, point: Point) -> None:
    def run(*, checkpointing: bool) -> tuple[list[Tensor], Tensor]:
        model, seen = zoo.build(name).train(), []
        if checkpointing:
            model.gradient_checkpointing_enable()
        seam = install(model, "test")
        with taps(model, [point], seen.append, layers=[1]):
            handle = seam.on(point, 1, lambda view, hidden: hidden * 1.5, phase=Phase.EDIT, owner="test")
            model(**zoo.batch(name, "9"), use_cache=False).logits.square().sum().backward()
        handle.remove()
        seam.release("test")
        assert find(model) is None
        return [event.hidden for event in seen], model.get_input_embeddings().weight.grad

    (plain, gradient), (recomputed, again) = run(checkpointing=False), run(checkpointing=True)
    assert len(plain) == len(recomputed) == 1
    assert torch.equal(plain[0], recomputed[0])
    torch.testing.assert_close(gradient, again)
    model, seen = zoo.build(name).train(), []
    with taps(model, [point], seen.append, layers=[1]):
        model(**zoo.batch(name, "9"), use_cache=False)
    torch.testing.assert_close(seen[0].hidden * 1.5, plain[0])


def test_what_cannot_be_had_is_refused() -> None:
    seam = install(zoo.build("opt"), "test")
    with pytest.raises(HostError, match="no MLP module"):
        seam.on(Point.MLP_INPUT, 0, lambda view, hidden: None, phase=Phase.READ, owner="test")
    with pytest.raises(HostError, match="can only be read"):
        seam.on(Point.ATTENTION_NORM, 0, lambda view, hidden: None, phase=Phase.EDIT, owner="test")
    with pytest.raises(HostError, match="input of fc2 can only be read"):
        seam.on(InputOf("fc2"), 0, lambda view, hidden: None, phase=Phase.EDIT, owner="test")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda seam: seam.on("nowhere", 0, print, phase=Phase.READ, owner="test"), "no point 'nowhere'"),
        (lambda seam: seam.on(Point.MLP, 10**9, print, phase=Phase.READ, owner="test"), "does not exist"),
        (lambda seam: seam.on(Point.MLP, 0, 5, phase=Phase.READ, owner="test"), "a int cannot be"),
        (lambda seam: seam.on(InputOf("mlp.nothing"), 0, print, phase=Phase.READ, owner="test"), "no module"),
        (lambda seam: seam.replace(InputOf("mlp"), 0, nn.Identity()), "nothing can stand in"),
        (lambda seam: seam.replace(Point.MLP, 0, "module"), "a str is no module"),
        (lambda seam: seam.replace(Point.MLP, 10**9, nn.Identity()), "does not exist"),
        (lambda seam: seam.replace(Point.BLOCK_INPUT, 0, nn.Identity()), "nothing can stand in"),
    ],
)
def test_what_is_no_point_layer_or_function_is_refused_and_nothing_changes(call: Any, told: str) -> None:
    model, inputs = zoo.build("llama"), zoo.batch("llama", "7")
    seam, seen = install(model, "test"), []
    seam.on(Point.MLP, -1, lambda view, hidden: seen.append(view.layer), phase=Phase.READ, owner="test")
    before = model(**inputs).logits
    with pytest.raises(UsageError, match=told):
        call(seam)
    assert torch.equal(model(**inputs).logits, before)
    assert seen == [1, 1]
    seam.release("test")


def test_a_layer_without_its_host_is_refused() -> None:
    model = zoo.build("llama")
    alula.attach(model, BLOCK_INPUT)
    with pytest.raises(AlulaError, match="without its host"):
        model.model.layers[0](torch.zeros(1, 3, model.config.hidden_size))


class Nothing(nn.Module):
    """A stand-in that adds nothing to the stream."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class Weaker(nn.Module):
    """A stand-in for attention: half of what it gives."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = self.own(*args, **kwargs)
        return output * 0.5, weights


@pytest.mark.parametrize("tapped_first", [True, False])
@pytest.mark.parametrize("point", [Point.ATTENTION, Point.MLP])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_stand_in_does_what_an_edit_does(name: str, point: Point, *, tapped_first: bool) -> None:
    model, batch = zoo.build(name), zoo.batch(name, "9")
    with torch.no_grad():
        own = model(**batch).logits
    seam = install(model, "test")
    factor = 0.5 if point is Point.ATTENTION else 0.0
    edit = seam.on(point, 1, lambda view, hidden: hidden * factor, phase=Phase.EDIT, owner="test")
    with torch.no_grad():
        expected = model(**batch).logits
    edit.remove()
    stand_in = Weaker(seam.anatomy.attention(1)) if point is Point.ATTENTION else Nothing()
    seen: list[Any] = []
    with ExitStack() as stack, torch.no_grad():
        if tapped_first:
            stack.enter_context(taps(model, [point], seen.append, layers=[1]))
        stack.callback(seam.replace(point, 1, stand_in).remove)
        if not tapped_first:
            stack.enter_context(taps(model, [point], seen.append, layers=[1]))
        torch.testing.assert_close(model(**batch).logits, expected)
    assert len(seen) == 1
    assert point is Point.ATTENTION or not bool(seen[0].hidden.any())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, own)
    with pytest.raises(UsageError, match="nothing can stand in"):
        seam.replace(Point.BLOCK_INPUT, 1, stand_in)


def test_a_stand_in_without_the_module_that_is_read_is_not_read() -> None:
    model, batch, seen = zoo.build("llama"), zoo.batch("llama", "9"), []
    seam = install(model, "test")

    def read(view: LayerView, inputs: Tensor) -> None:
        seen.append((view.layer, inputs.shape))

    seam.on(InputOf("mlp.down_proj"), 1, read, phase=Phase.READ, owner="test")
    stand_in = seam.replace(Point.MLP, 1, Nothing())
    model(**batch)
    assert not seen
    stand_in.remove()
    model(**batch)
    assert seen == [(1, (1, 9, model.config.intermediate_size))]
    assert len(model.model.layers[1].mlp.down_proj._forward_pre_hooks) == 1
    seam.release("test")
    assert not model.model.layers[1].mlp.down_proj._forward_pre_hooks


def test_stand_ins_go_in_reverse_order() -> None:
    seam = install(zoo.build("llama"), "test")
    first, second = seam.replace(Point.MLP, 0, Nothing()), seam.replace(Point.MLP, 0, Nothing())
    with pytest.raises(UsageError, match="reverse order"):
        first.remove()
    second.remove()
    first.remove()


def test_a_forward_is_not_kept_alive() -> None:
    """What stands at points, and the views it is given, hold no forward beyond its end."""
    model = zoo.build("llava-gemma3")
    wake(alula.attach(model, BLOCK_INPUT))
    alive: list[Any] = []
    gc.disable()
    try:
        with torch.no_grad(), taps(model, ["mlp"], lambda event: alive.append(weakref.ref(event.forward))):
            model(**zoo.batch("llava-gemma3", "3I4"))
        assert [forward() for forward in alive] == [None] * len(alive) != []
    finally:
        gc.enable()
