"""Who takes the tokens of a forward through a decoder layer: those that have work there, and only those.

A conductor stands at the `forward` of one layer, where hooks of the layer, whoever registered them, are outside: they
see all tokens, in whatever order things were attached, and gradient checkpointing recomputes what is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from alula.anatomy import NAME, Anatomy
from alula.errors import HostError, SeamError, UsageError
from alula.seam import dialect
from alula.seam.attention import ATTENTION, EAGER, Foreseen, answer_from_weights, mask_with_bias
from alula.seam.context import ForwardContext
from alula.seam.hooks import Handle
from alula.seam.lanes import Lane, LeanLayer, Lent, Plan, Slots, held_at, packed_mask, ranked
from alula.seam.requests import Foresight, Request, Work
from alula.seam.steps import free_layers
from alula.tokens import TokenMap

_EXPERTS = ("experts", "router")
"""what a mixture of experts has and a plain MLP has not"""


def check_readable(anatomy: Anatomy, *, shows_heads: bool = False) -> None:
    """Refuse a decoder that is given masks from which those of some tokens cannot be had.

    Args:
        shows_heads: also one whose attention does not show queries and keys.

    Raises:
        HostError: with the remedy.
    """
    name = anatomy.config._attn_implementation
    if shows_heads and name == EAGER:
        raise HostError(
            "the decoder runs eager attention, which does not show queries and keys",
            remedy='run it with SDPA: model.set_attn_implementation("sdpa")',
        )
    if name not in (EAGER, "sdpa", ATTENTION):
        raise HostError(
            f"the decoder runs the attention implementation {name!r}, whose masks cannot be read: tokens cannot be "
            "taken out of its layers",
            remedy='run it with SDPA: model.set_attn_implementation("sdpa")',
        )
    parts = getattr(anatomy.host, "tp_size", None) or 1
    if parts > 1:
        raise HostError(
            f"the decoder is split over {parts} devices by tensor parallelism, each of which has some of its heads: "
            "what a policy reads there is not the whole",
            remedy="load it without tp_plan, or with device_map, which keeps layers whole",
        )


@dataclass(frozen=True, eq=False)
class _Passage:
    """What some tokens of a forward take through decoder layers.

    Attributes:
        arguments: of the layers, in the place of the host's.
        standing: the tokens in the layers, as the forward is told it.
        told: what they were made of, which is kept so that none of it is taken for another.
    """

    arguments: dict[str, Any]
    standing: Any
    told: tuple[Any, ...]


class Conductor:
    """Runs one decoder layer, and where workers tell its parts apart, its attention and its MLP.

    Attributes:
        foresights: who wants to know its attention before it is said which tokens have work in it.
    """

    def __init__(self, anatomy: Anatomy, index: int, current: Callable[[], ForwardContext | None]) -> None:
        """
        Args:
            current: gives the forward that is in the layer in this thread: an MLP is not told.
        """
        self.anatomy, self.index, self._current = anatomy, index, current
        self.foresights: tuple[Request[Foresight], ...] = ()
        self._kind = anatomy.layer_type(index)
        self._stands: dict[str, tuple[nn.Module, Callable[..., Any] | None]] = {}
        self._hands_out_more: bool | None = None  # its MLP, beside what it adds; None: it was not seen yet
        self._names: tuple[str, ...] = ()

    def put(self) -> Handle:
        """Stand at the layer's `forward` until the handle is removed; what stood there is called from here."""
        layer = self.anatomy.layers[self.index]
        self._names = dialect.positional_names(layer)
        return self._stand("layer", layer, self._conduct)

    @property
    def is_outermost(self) -> bool:
        """Whether it stands at the layer's `forward`, and nobody wraps it."""
        return vars(self.anatomy.layers[self.index]).get("forward") == self._conduct

    def put_parts(self) -> Handle:
        """Stand at the `forward` of its attention and of its MLP too."""
        attention, mlp = self.anatomy.attention(self.index), self.anatomy.mlp(self.index)
        handles = (self._stand("attention", attention, self._attend), self._stand("mlp", mlp, self._feed))
        return Handle(self._leave_parts, handles)

    def _leave_parts(self, handles: tuple[Handle, ...]) -> None:
        for handle in handles:
            handle.remove()

    def _stand(self, name: str, module: nn.Module, function: Callable[..., Any]) -> Handle:
        before = vars(module).get("forward")  # where accelerate puts what moves weights
        self._stands[name] = module, before
        module.forward = function
        return Handle(self._leave, module, function, before)

    def _leave(self, module: nn.Module, function: Callable[..., Any], before: Callable[..., Any] | None) -> None:
        if vars(module).get("forward") != function:
            return  # somebody wraps it: without workers it passes everything on
        if before is None:
            del module.forward
        else:
            module.forward = before

    def _own(self, name: str) -> Callable[..., Any]:
        """The `forward` that it stands before."""
        module, before = self._stands[name]
        return MethodType(type(module).forward, module) if before is None else before

    @torch.compiler.disable(recursive=False)
    def _conduct(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        ctx: ForwardContext | None = kwargs.get(NAME)
        run = self._own("layer")
        if ctx is None:
            return run(*args, **kwargs)
        free = ctx.memo.get(free_layers)
        if free is None:
            free = ctx.memo[free_layers] = free_layers(ctx)
        if self.foresights and self.index not in ctx.left:
            self._foresee(ctx, args, kwargs)
        if self.index in free:
            told = free[self.index]
            if told is None:
                return run(*args, **kwargs)
            if kwargs.get(dialect.MASK, told) is None:
                told.layer.coming = told.coming
                return run(*args, **kwargs)
        given = self._hidden_of(args, kwargs)
        plan = self._plan(ctx, given)
        lean = self._lean(ctx, None if plan is None else plan.attending)
        if plan is None and lean is None:
            return run(*args, **kwargs)
        count = ctx.tokens.shape[1]
        if given.shape[1] != count:
            raise SeamError(
                f"decoder layer {self.index} was entered by {given.shape[1]} tokens of {count}, under a policy that "
                "takes tokens out of it",
                remedy="remove the hook that takes tokens out, or the policy",
            )
        keys = self._keys(lean, plan, ctx)
        layer = None if plan is None else plan.layer
        if layer is not None and layer.is_empty:
            ctx.check_unread(self.index, is_skipped=True)
            return given
        named = dialect.named_of(self._names, args, kwargs)
        passage = self._passage(ctx, plan, keys, named, given)
        named.update(passage.arguments)
        if plan is not None and not (plan.attention is None and plan.mlp is None):
            ctx.plans[self.index] = plan
        named.pop(self._names[0], None)
        ctx.pack(self.index, passage.standing)
        try:
            output = run(given if layer is None else layer.gather(given), **named)
        finally:
            ctx.unpack(self.index)
        if layer is None:
            return output
        return dialect.output_with_hidden(output, layer.scatter(dialect.hidden_of_output(output), given))

    def _hidden_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return dialect.hidden_of(args, kwargs, where=type(self._stands["layer"][0]).__name__)

    def _passage(
        self, ctx: ForwardContext, plan: Plan | None, keys: Slots | None, named: dict[str, Any], given: Tensor
    ) -> _Passage:
        """What the tokens of a plan take through layers that are given the same: made once for all of these."""
        told = plan, keys, *map(named.get, (dialect.MASK, dialect.ROPE, dialect.POSITIONS))
        key = (_Passage, self._kind, *map(id, told))
        if key not in ctx.memo:
            ctx.memo[key] = self._new_passage(ctx, told, named, given)
        return ctx.memo[key]

    def _new_passage(
        self, ctx: ForwardContext, told: tuple[Any, ...], named: dict[str, Any], given: Tensor
    ) -> _Passage:
        plan: Plan | None = told[0]
        keys: Slots | None = told[1]
        lane = None if plan is None else plan.attending
        taken = {name: named[name] for name in (dialect.ROPE, dialect.POSITIONS) if name in named}
        if plan is not None and plan.positions is not None:
            taken = dialect.with_rope(taken, self._angles(ctx, plan.positions, given), plan.positions)
        if lane is not None:
            taken = dialect.with_positions(taken, partial(ctx.once, _of_lane, lane))
        if keys is not None:
            past = ctx.all_tokens.shape[1] - ctx.tokens.shape[1]
            additive = given.dtype if self.anatomy.config._attn_implementation == EAGER else None
            taken[dialect.MASK] = packed_mask(named.get(dialect.MASK), lane, keys, ctx.tokens, past, additive)
        standing = ctx.stood(None if plan is None else plan.layer, None if keys is None else keys.places)
        return _Passage(taken, standing, told)

    @torch.compiler.disable  # an exception leaves it half-way
    @torch.no_grad()
    def _foresee(self, ctx: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the layer as far as its attention, for those who want to know that before they say who has work here.

        Raises:
            SeamError: it was run, and its attention did not show itself.
        """
        count, past = ctx.tokens.shape[1], ctx.all_tokens.shape[1] - ctx.tokens.shape[1]
        run, view = self._own("layer"), ctx.at(self.index)
        for request in self.foresights:
            if (request.mark is not None and request.mark not in ctx.marks) or request.by.queries(view) is None:
                continue
            given = self._hidden_of(args, kwargs)
            named = dialect.named_of(self._names, args, kwargs)
            named = {name: value for name, value in named.items() if not isinstance(value, Cache)}
            named.pop(self._names[0], None)
            work = request.by.standing(view)
            plan = None if work is None else ctx.once(Plan.of, work, ctx.tokens)
            lane = None if plan is None else plan.attending
            keys = ctx.once(_stretch, ctx.tokens, past, past + count) if lane is None else _behind(lane, past)
            seen = named | {dialect.MASK: packed_mask(named.get(dialect.MASK), lane, keys, ctx.tokens, past, None)}
            if plan is not None and plan.positions is not None:
                seen = dialect.with_rope(seen, self._angles(ctx, plan.positions, given), plan.positions)
            if lane is not None:
                seen = dialect.with_positions(seen, partial(ctx.once, _of_lane, lane))
            with ctx.foreseeing(self.index, request, lane, keys.places):
                try:
                    run(given if lane is None else lane.gather(given), **seen)
                except Foreseen:
                    continue
            raise SeamError(
                f"the attention of decoder layer {self.index} did not show itself before the layer was run",
                remedy='run the decoder with SDPA: model.set_attn_implementation("sdpa")',
            )

    @torch.compiler.disable  # lanes are made by reading the device, which torch 2.7 cannot break a graph at
    def _plan(self, ctx: ForwardContext, hidden: Tensor) -> Plan | None:
        """The work in this layer by all who have a say in this forward; None: all tokens do all."""
        work = None
        for request in ctx.requests.workers.get(self.index, ()):
            if request.mark is None or request.mark in ctx.marks:
                here = request.by.work(ctx.at(self.index), hidden)
                if here is not None:
                    work = here if work is None else ctx.once(Work.__and__, work, here)
        return None if work is None else ctx.once(Plan.of, work, ctx.tokens)

    def _lean(self, ctx: ForwardContext, lane: Lane | None) -> LeanLayer | None:
        """The layer's lean cache layer, made where tokens are taken out; None where it has none."""
        cache = ctx.layer_cache
        layers = getattr(cache, "layers", None) or []
        there = layers[self.index] if self.index < len(layers) else None
        if isinstance(there, LeanLayer):
            if not there.length:  # it was reset, and what begins now may be of other samples
                there.slots = ctx.once(_stretch, ctx.tokens, 0, 0)
            return there
        if cache is None or lane is None:
            return None
        held = None if ctx.presence is None else ctx.presence.index(self.index)
        return LeanLayer.of(cache, self.index, held, partial(ctx.once, _stretch, ctx.tokens))

    def _angles(self, ctx: ForwardContext, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The RoPE tables of this kind of layer at other positions, made once per forward."""
        key = Conductor, self._kind, id(positions)
        if key not in ctx.memo:
            ctx.memo[key] = self.anatomy.rope_at(self.index, positions, hidden)
        return ctx.memo[key]

    def _keys(self, lean: LeanLayer | None, plan: Plan | None, ctx: ForwardContext) -> Slots | None:
        """The keys that attention will be given, of which a lean cache layer is told; None: of all tokens."""
        count = ctx.tokens.shape[1]
        lane = None if plan is None else plan.attending
        if plan is not None and plan.lends and lane is not None:
            return self._lent(lean, plan, lane, ctx)
        if lean is None:
            return None if lane is None else ctx.once(_own, lane)
        if lane is not None and lane.is_empty:
            lean.pass_by(count)
            return lean.slots
        return lean.expect(lane, count)

    @torch.compiler.disable  # it may read the device
    def _lent(self, lean: LeanLayer | None, plan: Plan, lane: Lane, ctx: ForwardContext) -> Slots:
        """The same where tokens leave the key that they have in the layer before.

        Raises:
            UsageError: there is no cache to find it in.
        """
        if lean is None or ctx.layer_cache is None:
            raise UsageError(
                "a policy has tokens leave the keys of the layer before, which are read out of the cache, and this "
                "forward has none",
                remedy='pass use_cache=True (with gradient checkpointing there is none), or keys="own" or "absent"',
            )
        count = ctx.tokens.shape[1]
        source = ctx.layer_cache.layers[self.index - 1]
        if not isinstance(source, DynamicLayer) or source.is_sliding:
            raise HostError(
                f"decoder layer {self.index - 1}, whose keys the next is to leave, keeps them in a "
                f"{type(source).__name__}, which lets go of some before they can be read",
                remedy='give keys="own" or "absent"',
            )
        slots = source.slots if isinstance(source, LeanLayer) else None
        at = ctx.once(held_at, slots, plan.lent, ctx.tokens, lean.length)
        lent = Lent(source, at, *ctx.once(ranked, lane, plan.lent, ctx.tokens))
        return lean.take(plan.lent, count, lent) if lane.is_empty else lean.expect(plan.lent, count, lent)

    @torch.compiler.disable(recursive=False)
    def _attend(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer's attention."""
        ctx: ForwardContext | None = kwargs.get(NAME)
        attention, plan = self.anatomy.attention(self.index), None if ctx is None else ctx.plans.get(self.index)
        run = self._own("attention")
        if ctx is None or plan is None:
            return run(*args, **kwargs)
        part = plan.attention
        lane = None if part is None else part.lane
        given = hidden = dialect.hidden_of(args, kwargs, where=type(attention).__name__)
        if part is not None:
            if part.is_empty:
                ctx.check_unread(self.index, is_skipped=False)
                return torch.zeros_like(given), None
            hidden = part.gather(given)
        args, kwargs = dialect.with_hidden(args, kwargs, hidden)
        with nullcontext() if lane is None else ctx.narrowed(self.index, lane):
            if ctx.requests.biases:
                kwargs = mask_with_bias(attention, kwargs, ctx, hidden)
            output = run(*args, **kwargs)
            is_any = ctx.requests.is_any_of(self.index)  # a config takes long to answer
            if is_any and self.anatomy.config._attn_implementation == EAGER and ctx.is_asked(self.index):
                answer_from_weights(attention, output[1], ctx)
        if part is None:
            return output
        return dialect.output_with_hidden(output, part.scatter(dialect.hidden_of_output(output), given))

    @torch.compiler.disable(recursive=False)
    def _feed(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer's MLP."""
        ctx, mlp = self._current(), self.anatomy.mlp(self.index)
        run = self._own("mlp")
        part = None if ctx is None or self.index not in ctx.plans else ctx.plans[self.index].mlp
        if ctx is None or part is None or part.lane is None:
            return run(*args, **kwargs)
        given = dialect.hidden_of(args, kwargs, where=type(mlp).__name__)
        if part.is_empty:
            return self._nothing(run, args, kwargs, given)
        args, kwargs = dialect.with_hidden(args, kwargs, part.gather(given))
        with ctx.narrowed(self.index, part.lane):
            output = run(*args, **kwargs)
        made = dialect.hidden_of_output(output)
        scattered = part.scatter(made.view(*given.shape[:1], -1, given.shape[-1]), given)
        # Llama-4's give the tokens of all samples in one line
        return dialect.output_with_hidden(output, scattered.flatten(0, 1) if made.dim() == 2 else scattered)

    def _nothing(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Tensor) -> Any:
        """What an MLP that adds nothing gives. Some of those with experts hand out more than what they add (GPT-OSS);
        of one token it is seen what."""
        output, zeros = None, torch.zeros_like(given)
        if self._hands_out_more is None and not any(hasattr(self.anatomy.mlp(self.index), name) for name in _EXPERTS):
            self._hands_out_more = False
        if self._hands_out_more is not False:
            args, kwargs = dialect.with_hidden(args, kwargs, given[:, :1])
            output = run(*args, **kwargs)
            self._hands_out_more = isinstance(output, tuple)
        return dialect.output_with_hidden(output, zeros)


def _of_lane(lane: Lane, table: Tensor, dim: int) -> Tensor:
    """The positions of a lane's tokens, see `dialect.with_positions`."""
    return lane.gather(table) if table.dim() == dim else torch.stack([lane.gather(part) for part in table])


def _stretch(tokens: TokenMap, start: int, stop: int) -> Slots:
    return Slots(torch.arange(start, stop, device=tokens.device).expand(tokens.shape[0], -1))


def _behind(lane: Lane, past: int) -> Slots:
    """The keys of a lane's tokens alone, behind so many cached ones."""
    return Slots(lane.index + past, lane.real)


def _own(lane: Lane) -> Slots:
    """The keys of a layer without a cache."""
    return Slots(lane.index, lane.real)
