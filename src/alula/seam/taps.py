"""Taps: read the inputs and outputs of blocks, attention and MLP as a forward streams by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from alula.errors import UsageError
from alula.seam.context import ForwardContext
from alula.seam.install import Seam, install
from alula.seam.points import Phase, Point
from alula.seam.scope import marked
from alula.seam.view import LayerView
from alula.tokens import TokenMap

_serial = itertools.count()


@dataclass(frozen=True)
class TapEvent:
    """What a tap saw: hidden states of one point of one layer.

    Attributes:
        point: the block's input or output, the output of a norm, or what attention or the MLP adds to the stream.
        layer: index of the decoder layer.
        hidden: (B, M, d), the host's own tensor (do not write into it).
        tokens: TokenMap of these M tokens, all new ones of the forward unless a hook took some out of this layer.
        forward: the forward it happened in.
    """

    point: Point
    layer: int
    hidden: Tensor
    tokens: TokenMap
    forward: ForwardContext


@contextmanager
def taps(
    model: nn.Module,
    points: Sequence[str],
    sink: Callable[[TapEvent], None],
    *,
    layers: Sequence[int] | None = None,
) -> Iterator[Seam]:
    """Call `sink` with a `TapEvent` for each point of each chosen layer of the forwards this thread begins inside.

    Args:
        model: a host.
        points: which of "block_input", "attention_norm", "attention_input", "attention", "mlp_norm", "mlp_input", "mlp"
            and "block_output" to tap (see `Point`).
        sink: called in the order of computation. Tensors are the host's own: reduce them, do not keep them all.
        layers: indices of decoder layers, negative ones counted from the last; all when None.

    Raises:
        UsageError: an unknown point or a layer the host does not have.
    """
    unknown = sorted(set(points) - set(Point))
    if unknown:
        raise UsageError(f"unknown tap point {unknown[0]!r}", remedy=f"use {', '.join(Point)}")
    name = f"taps-{next(_serial)}"
    seam = install(model, name)
    with ExitStack() as stack:
        stack.callback(seam.release, name)
        for index in seam.anatomy.layer_indices(layers):
            for point in dict.fromkeys(map(Point, points)):
                report = partial(_report, sink, point)
                stack.callback(seam.on(point, index, report, phase=Phase.READ, owner=name, mark=name).remove)
        stack.enter_context(marked(name))
        yield seam


def _report(sink: Callable[[TapEvent], None], point: Point, view: LayerView, hidden: Tensor) -> None:
    sink(TapEvent(point, view.layer, hidden, view.tokens, view.ctx))
