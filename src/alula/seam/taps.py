"""Taps: read the inputs and outputs of blocks, attention and MLP as a forward streams by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from alula.errors import UsageError
from alula.seam import dialect
from alula.seam.context import ForwardContext
from alula.seam.hooks import ByThread, with_keywords
from alula.seam.install import NAME, Seam, install
from alula.seam.scope import marked
from alula.tokens import TokenMap

Point = Literal["block_input", "block_output", "attention_norm", "attention", "mlp_norm", "mlp"]

_serial = itertools.count()


@dataclass(frozen=True)
class TapEvent:
    """What a tap saw: hidden states of one point of one layer.

    Attributes:
        point: the block's input or output, the output of a norm, or what attention or the MLP adds to the stream.
        layer: index of the decoder layer.
        hidden: (B, S, d), the host's own tensor (do not write into it).
        tokens: TokenMap of these S tokens.
        forward: the forward it happened in.
    """

    point: Point
    layer: int
    hidden: Tensor
    tokens: TokenMap
    forward: ForwardContext


class _Tap:
    """The hooks of one tapped layer. Each point reports once per forward, also when checkpointing recomputes it."""

    def __init__(self, mark: str, layer: int, points: Sequence[Point], sink: Callable[[TapEvent], None]) -> None:
        self.mark, self.layer, self.points, self.sink = mark, layer, points, sink
        self.inside_layer: ByThread[ForwardContext] = ByThread()

    @with_keywords
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inside_layer.drop()  # a forward that failed there
        forward = kwargs.get(NAME)
        if forward is None or self.mark not in forward.marks:
            return
        self.inside_layer.put(forward)
        if "block_input" in self.points:
            self.report("block_input", dialect.hidden_of(args, kwargs, where=type(module).__name__))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if "block_output" in self.points:
            self.report("block_output", dialect.hidden_of_output(output))
        self.inside_layer.drop()

    def inside(self, point: Point) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.report(point, dialect.hidden_of_output(output))

        return hook

    def report(self, point: Point, hidden: Tensor) -> None:
        forward = self.inside_layer.get()
        if forward is None:  # a recomputation during backward, reported already, or another thread's
            return
        tokens = forward.tokens
        self.sink(TapEvent(point, self.layer, hidden.view(*tokens.shape, -1), tokens, forward))


@contextmanager
def taps(
    model: nn.Module,
    points: Sequence[Point],
    sink: Callable[[TapEvent], None],
    *,
    layers: Sequence[int] | None = None,
) -> Iterator[Seam]:
    """Call `sink` with a `TapEvent` for each point of each chosen layer of the forwards this thread begins inside.

    Args:
        model: a host.
        points: which of "block_input", "block_output", "attention_norm", "attention", "mlp_norm", "mlp" to tap.
        sink: called in the order of computation. Tensors are the host's own: reduce them, do not keep them all.
        layers: indices of decoder layers, negative ones counted from the last; all when None.

    Raises:
        UsageError: an unknown point or a layer the host does not have.
    """
    unknown = sorted(set(points) - set(get_args(Point)))
    if unknown:
        raise UsageError(f"unknown tap point {unknown[0]!r}", remedy=f"use {', '.join(get_args(Point))}")
    name = f"taps-{next(_serial)}"
    seam = install(model, name, sink)
    handles = []
    try:
        anatomy = seam.anatomy
        for index in _layer_indices(layers, anatomy.num_layers):
            tap = _Tap(name, index, points, sink)
            layer = anatomy.layers[index]
            handles.append(layer.register_forward_pre_hook(tap.enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(tap.leave))
            inside: dict[Point, nn.Module] = {
                "attention_norm": anatomy.attention_norm(index),
                "attention": anatomy.attention_out(index),
                "mlp_norm": anatomy.mlp_norm(index),
                "mlp": anatomy.mlp_out(index),
            }
            handles.extend(inside[p].register_forward_hook(tap.inside(p)) for p in points if p in inside)
        with marked(name):
            yield seam
    finally:
        for handle in handles:
            handle.remove()
        seam.release(name)


def _layer_indices(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise UsageError(f"layer {layer} does not exist", remedy=f"the host has layers 0 to {count - 1}")
    return [layer % count for layer in layers]
