"""Who takes the tokens of a forward through a decoder layer: those that have work there, and only those.

A conductor stands at the `forward` of one layer, where hooks of the layer, whoever registered them, are outside: they
see all tokens, in whatever order things were attached, and gradient checkpointing recomputes what is inside.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alula.anatomy import NAME, Anatomy
from alula.errors import HostError, SeamError
from alula.seam import dialect
from alula.seam.attention import ATTENTION, EAGER
from alula.seam.context import ForwardContext
from alula.seam.hooks import Handle
from alula.seam.lanes import Lane, LeanLayer, Slots, packed_mask
from alula.seam.requests import Request, Worker
from alula.tokens import TokenMap


def check_readable(anatomy: Anatomy) -> None:
    """Refuse a decoder that is given masks from which those of some tokens cannot be had.

    Raises:
        HostError: with the remedy.
    """
    name = anatomy.config._attn_implementation
    if name not in (EAGER, "sdpa", ATTENTION):
        raise HostError(
            f"the decoder runs the attention implementation {name!r}, whose masks cannot be read: tokens cannot be "
            "taken out of its layers",
            remedy='run it with SDPA: model.set_attn_implementation("sdpa")',
        )


class Conductor:
    """Runs one decoder layer.

    Attributes:
        workers: who says which tokens have work in it. Without one it is not there.
    """

    def __init__(self, anatomy: Anatomy, index: int) -> None:
        self.anatomy, self.index = anatomy, index
        self.workers: tuple[Request[Worker], ...] = ()
        self._before: Any = None
        self._names: tuple[str, ...] = ()

    @property
    def _layer(self) -> nn.Module:
        return self.anatomy.layers[self.index]

    def put(self) -> Handle:
        """Stand at the layer's `forward` until the handle is removed; what stood there is called from here."""
        layer = self._layer
        self._names = dialect.positional_names(layer)
        self._before = vars(layer).get("forward")  # where accelerate puts what moves weights
        layer.forward = self._conduct

        def remove() -> None:
            if vars(layer).get("forward") != self._conduct:
                return  # somebody wraps it: without workers it passes everything on
            if self._before is None:
                del layer.forward
            else:
                layer.forward = self._before

        return Handle(remove)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        return type(layer).forward(layer, *args, **kwargs) if self._before is None else self._before(*args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _conduct(self, *args: Any, **kwargs: Any) -> Any:
        ctx: ForwardContext | None = kwargs.get(NAME)
        if ctx is None:
            return self._run(*args, **kwargs)
        where = type(self._layer).__name__
        given = dialect.hidden_of(args, kwargs, where=where)
        lane = self._lane(ctx, given)
        named = dialect.named_of(self._names, args, kwargs)
        lean = self._lean(ctx, dialect.cache_of(named, where=where), lane)
        if lane is None and lean is None:
            return self._run(*args, **kwargs)
        count = ctx.tokens.shape[1]
        if given.shape[1] != count:
            raise SeamError(
                f"decoder layer {self.index} was entered by {given.shape[1]} tokens of {count}, under a policy that "
                "takes tokens out of it",
                remedy="remove the hook that takes tokens out, or the policy",
            )
        if lane is not None and not lane.index.shape[1]:
            if lean is not None:
                lean.pass_by(count)
            return given
        past = ctx.all_tokens.shape[1] - count
        if lean is None:
            assert lane is not None
            keys = ctx.once(_own, lane)
        else:
            keys = lean.expect(lane, count)
        additive = given.dtype if self.anatomy.config._attn_implementation == EAGER else None
        named[dialect.MASK] = ctx.once(packed_mask, named.get(dialect.MASK), lane, keys, ctx.tokens, past, additive)
        hidden = given
        if lane is not None:
            hidden = lane.gather(given)
            named = dialect.with_positions(named, partial(ctx.once, _of_lane, lane))
        named.pop(self._names[0], None)
        ctx.pack(self.index, lane, keys)
        try:
            output = self._run(hidden, **named)
        finally:
            ctx.unpack(self.index)
        if lane is None:
            return output
        return dialect.output_with_hidden(output, lane.scatter(dialect.hidden_of_output(output), given))

    def _lane(self, ctx: ForwardContext, hidden: Tensor) -> Lane | None:
        """The tokens that have work in this layer by all who have a say in this forward; None: all."""
        working = None
        for request in self.workers:
            if request.mark is None or request.mark in ctx.marks:
                here = request.by.working(ctx.at(self.index), hidden)
                if here is not None:
                    working = here if working is None else ctx.once(torch.logical_and, working, here)
        return None if working is None else ctx.once(Lane.of, working, ctx.tokens)

    def _lean(self, ctx: ForwardContext, cache: Any, lane: Lane | None) -> LeanLayer | None:
        """The layer's lean cache layer, made where tokens are taken out; None where it has none."""
        layers = getattr(cache, "layers", None) or []
        there = layers[self.index] if self.index < len(layers) else None
        if cache is None or (lane is None and not isinstance(there, LeanLayer)):
            return None
        held = None if ctx.presence is None else ctx.presence.index(self.index)
        return LeanLayer.of(cache, self.index, held, partial(ctx.once, _stretch, ctx.tokens))


def _of_lane(lane: Lane, table: Tensor, dim: int) -> Tensor:
    """The positions of a lane's tokens, see `dialect.with_positions`."""
    return lane.gather(table) if table.dim() == dim else torch.stack([lane.gather(part) for part in table])


def _stretch(tokens: TokenMap, start: int, stop: int) -> Slots:
    return Slots(torch.arange(start, stop, device=tokens.device).expand(tokens.shape[0], -1))


def _own(lane: Lane) -> Slots:
    """The keys of a layer without a cache."""
    return Slots(lane.index, lane.real)
