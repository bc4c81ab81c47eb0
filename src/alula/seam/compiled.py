"""Decoder layers compiled with what grafts add to them.

What is compiled is the `forward` of a layer, whose hooks stay outside: there a forward's bookkeeping is done, as
it is without. The layer is then given tensors alone (`frame`), and of a cache only its own part, so that one graph
serves all layers of a kind, all lengths and all steps. A graph is whole or an error; where a forward asks something of
a layer that is not compiled (probes, policies), that layer runs as it is written, and says so once.

Shapes: B batch, S new tokens, d stream width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx.experimental._config as shapes
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from alula.anatomy import NAME, Anatomy
from alula.errors import HostError
from alula.seam import dialect
from alula.seam.attention import ATTENTION, align, are_few, with_a_key
from alula.seam.context import ForwardContext
from alula.seam.frame import Frame, LinearPart, Part, Sums, Uncompiled, enter
from alula.seam.growing import GrowingLayer
from alula.seam.hooks import Handle

logger = logging.getLogger(__name__)

Region = Callable[..., tuple[Any, list[Tensor]]]
# a layer's graphs differ by prompt, step and training, by one sample or several, by the learners at work
_GRAPHS = 64


class _OneLayer:
    """The part of a cache that belongs to a layer, in the place of the cache: which layer it is is no part of a
    graph."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values)


class _Caught:
    """In the place of a cache that is empty yet: what the layer leaves in it."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.left = [keys, values]
        return keys, values


def _region(
    layer: nn.Module,
    parts: tuple[Part, ...],
    linears: dict[str, tuple[LinearPart, ...]],
    asked: Sums | None,
    held: Any,
    cache_name: str | None,
    hidden: Tensor,
    named: Mapping[str, Any],
) -> tuple[Any, list[Tensor]]:
    """What is compiled: a layer's output, and what it left in a cache that was empty."""
    # said here, so that it is guarded: in a layer without a graft's hooks nobody asks, and its graph would be taken for
    # that of a layer in which they stand
    frame = Frame(tuple(parts), hidden, asked, dict(linears.items()))
    caught = _Caught()
    given = {**named, NAME: frame}
    if cache_name is not None:
        given[cache_name] = caught if held is None else _OneLayer(held)
    enter(frame)
    output = type(layer).forward(layer, hidden, **given)
    enter(None)
    return output, caught.left


def compiled(**options: Any) -> Region:
    """The region, to be compiled as `torch.compile` is told, in graphs that are whole.

    torch is told as well, for good, to keep as many graphs of a layer as there are kinds of forwards, and not to take
    sizes that happen to be equal (as many image tokens as a rank) for the same. It has no options for that.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    shapes.use_duck_shape = False
    return torch.compile(_region, fullgraph=True, **options)


class CompiledLayer:
    """Stands at the `forward` of one decoder layer and has it run compiled where it can be."""

    def __init__(
        self,
        anatomy: Anatomy,
        index: int,
        region: Region,
        parts: Callable[[ForwardContext], tuple[tuple[Part, ...], dict[str, tuple[LinearPart, ...]]]],
        told: set[str],
    ) -> None:
        """
        Args:
            region: from `compiled`.
            parts: gives what grafts add to attention in this layer, and to outputs of modules below it by path, or
                raises `Uncompiled`.
            told: why layers of this decoder ran uncompiled, as far as it was said.
        """
        self.anatomy, self.index, self.region, self._parts = anatomy, index, region, parts
        self._names = dialect.positional_names(anatomy.layers[index])
        self._told = told

    def put(self) -> Handle:
        """Stand at the layer's `forward` until the handle is removed."""
        layer = self.anatomy.layers[self.index]
        layer.forward = self._forward
        return Handle(self._leave)

    def _leave(self) -> None:
        layer = self.anatomy.layers[self.index]
        if vars(layer).get("forward") == self._forward:
            del layer.forward

    @torch.compiler.disable  # what is compiled here is compiled by itself
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        layer, ctx = self.anatomy.layers[self.index], kwargs.get(NAME)
        if ctx is None:
            return type(layer).forward(layer, *args, **kwargs)
        try:
            return self._run(layer, ctx, dialect.named_of(self._names, args, kwargs))
        except Uncompiled as reason:
            if str(reason) not in self._told:
                self._told.add(str(reason))
                logger.warning("decoder layer %d, and others like it, runs uncompiled: %s", self.index, reason)
        return type(layer).forward(layer, *args, **kwargs)

    def _run(self, layer: Any, ctx: ForwardContext, named: dict[str, Any]) -> Any:
        if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
            raise Uncompiled("gradient checkpointing computes it again")
        cache = dialect.cache_of(named, where=type(layer).__name__)
        held, is_kept = self._held(cache), cache is not None
        names = [name for name, value in named.items() if value is cache] if is_kept else []
        parts, linears = self._parts(ctx)
        hidden = named.pop(self._names[0])
        asked = self._asked(ctx, parts, named.get(dialect.MASK))
        for name in (NAME, *names):
            named.pop(name)
        for part in parts:
            part.by.forget(ctx)
        output, left = self.region(layer, parts, linears, asked, held, names[0] if names else None, hidden, named)
        if left and cache is not None:
            keys, values = left
            cache.update(keys, values, self.index)
        return output

    def _held(self, cache: Cache | None) -> Any:
        """The layer's part of a cache; None: there is no cache, or it is empty and grows.

        Raises:
            Uncompiled: it cannot be handed over by itself.
        """
        if cache is None:
            return None
        layers = cache.layers
        there: Any = layers[self.index] if self.index < len(layers) else None
        if there is None or (type(there) in (DynamicLayer, GrowingLayer) and not there.get_seq_length()):
            return None
        if type(there) not in (DynamicLayer, GrowingLayer, StaticLayer) or not there.is_initialized:
            kind = "empty " if not there.is_initialized else ""
            raise Uncompiled(f"its keys go into an {kind}{type(there).__name__}")
        return there

    def _asked(self, ctx: ForwardContext, parts: tuple[Part, ...], mask: Any) -> Sums | None:
        """The sums of attention that parts want.

        Raises:
            Uncompiled: others want something of this layer's attention.
        """
        wanting = [part for part in parts if part.wants_sums]
        if ctx.reads_attention(self.index, [part.by for part in wanting]):
            raise Uncompiled("its attention is read or biased")
        if not wanting:
            return None
        if self.anatomy.config._attn_implementation != ATTENTION:
            raise Uncompiled(
                f"the decoder runs the attention implementation {self.anatomy.config._attn_implementation}"
            )
        keys = ctx.all_tokens.shape[1] if ctx.room is None else ctx.room
        view = ctx.at(self.index)
        columns = [ctx.once(_to_length, part.by.key_values(view), keys) for part in wanting]
        is_few = all(part.is_few for part in wanting) and are_few(ctx.tokens.shape[1], mask)
        is_apart = not is_few and ctx.split(ctx.requests.sums.get(self.index, ())) is not None
        blank = None
        if not is_few and mask is not None and mask.dtype == torch.bool:
            mask, blank = ctx.once(with_a_key, mask)
        return Sums(
            columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1),
            tuple(each.shape[-1] for each in columns),
            is_few,
            is_apart,
            None if blank is None else mask,
            blank,
        )


def _to_length(values: Tensor, keys: int) -> Tensor:
    # in memory of its own: strides of what lies in a cache that grows change as it does
    return align(values, keys, dim=1).clone(memory_format=torch.contiguous_format)


def check_compilable(anatomy: Anatomy) -> None:
    """Refuse a decoder whose layers cannot be compiled with grafts.

    Raises:
        HostError: with the remedy.
    """
    wrapped = [index for index, layer in enumerate(anatomy.layers) if "forward" in vars(layer)]
    if wrapped:
        raise HostError(
            f"something stands at the forward of decoder layer {wrapped[0]}: a policy, or hooks of accelerate",
            remedy="compile first, or take it away",
        )
    if len(anatomy.attended) < anatomy.num_layers or not anatomy.passes_keywords:
        raise HostError(
            f"the layers of {type(anatomy.decoder).__name__} differ, or do not tell their attention which forward they "
            "are in: they cannot be compiled with grafts",
            remedy="compile the decoder as a whole, decoder.compile(), whose graph then breaks at grafts",
        )
    if anatomy.attention_out(0) is not anatomy.attention(0):
        raise HostError(
            f"{type(anatomy.layers[0]).__name__} has a norm between its attention and the stream, which is not told "
            "what forward it is in: its layers cannot be compiled with grafts",
            remedy="compile the decoder as a whole, decoder.compile(), whose graph then breaks at grafts",
        )
