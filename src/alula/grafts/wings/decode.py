"""Learners for few queries, all of a layer at once: what a step of decoding computes.

While prefilling each learner attends by itself through a fused kernel (`prefill`). For few queries, launching
operations costs more than what they compute, and gathering costs more than attending. So all learners attend to one
table of keys, in the order of the tokens, in which every token's key is made by the learner it is a key of; what a
query may not attend to is masked. Masks are (B, learners * Q, tokens) with Q below a head's width: nothing grows with
the square of the tokens.

Values are never made: sum_j p_j (x_j + up_v z_j) = sum_j p_j x_j + up_v sum_j p_j z_j, and what comes of these two sums
goes through `o.down` in one product (`stacked.Weights.out_of_kept`). Where ranks are low and memory is plenty, what
`o.down` makes of every value is kept, head by head (`learners.keeps_outputs`): less is read, in one product. What new
tokens add to the cache is made for all layers at once.

Shapes: B batch, Q new tokens, N = P + Q all tokens, d stream width, H heads, D their width, L learners, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.learners import (
    MOST_SEGMENTS,
    Angles,
    Engine,
    LayerLearners,
    by_owner,
    check_roles,
    keys_of,
    narrow_angles,
    prepared,
    project,
    rotate,
    segment_lengths,
)
from alula.grafts.wings.stacked import LayerWeights, Weights, compute_dtype
from alula.seam import ForwardContext
from alula.tokens import KnownTokens, TokenMap

Which = Literal["new", "all"]


class Segment(NamedTuple):
    """Tokens `start` to `stop` are keys of the learner of this index; -1: of none."""

    start: int
    stop: int
    learner: int


class LayerMade(NamedTuple):
    """What the learners of one layer go by in a step.

    Attributes:
        weights: of the learners.
        out: (L, H * (D + r), r), see `Weights.out_of_kept`; None where values are kept as what `o.down` makes of them.
        keys: (B, N, r) factors of keys, or (B, H, N, D) rotated keys.
        values: (B, N, r) factors of values; (B, H, N, r) what `o.down` makes of them.
    """

    weights: LayerWeights
    out: Tensor | None
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Made:
    """What the layers of one graft share in a forward.

    Attributes:
        weights: of their learners, by layer.
        out: (layers, L, H * (D + r), r), see `Weights.out_of_kept`; None as in `LayerMade`.
        keys: (B, layers, N, r) factors of keys; (B, layers, H, N, D) rotated keys where the cache holds these.
        values: (B, layers, N, r) factors of values; (B, layers, H, N, r) what `o.down` makes of them.
    """

    weights: list[LayerWeights]
    out: Tensor | None
    keys: Tensor
    values: Tensor

    @cached_property
    def layers(self) -> list[LayerMade]:
        """The same, layer by layer."""
        out = [None] * len(self.weights) if self.out is None else self.out.unbind()
        parts = zip(self.weights, out, self.keys.unbind(1), self.values.unbind(1), strict=True)
        return [LayerMade(*each) for each in parts]


def raised(tokens: Tensor, factors: Tensor, owners: Tensor, weights: LayerWeights) -> Tensor:
    """(B, N, d) keys of (B, N, d) tokens, not rotated: plus `k.up` of their (B, N, r) factors, by the learner whose key
    each is."""
    own = (factors.to(tokens.dtype)[:, :, None] * owners[..., None]).flatten(2)
    ups = weights.kv_up[:, 0].flatten(0, 1).to(tokens.dtype)
    return torch.baddbmm(tokens, own, ups.expand(len(own), -1, -1))


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What the learners of all layers of a kind need beside what was made for each.

    Attributes:
        heads: (B * H, N, D) the input tokens, each head's side by side; None where values are kept as what `o.down`
            makes of them.
        attn_bias: (B * H, L * Q, N), as in `DecodeEngine`.
        active: (B, Q, L), likewise.
        angles: of the new tokens, for (B, H, L, Q, D); None without RoPE, or beside a turn.
        turn: (B, D, D) see `Siblings.turn`; None: there are several queries, or no RoPE.
    """

    heads: Tensor | None
    attn_bias: Tensor
    active: Tensor | None
    angles: Angles | None
    turn: Tensor | None

    def attend(
        self,
        query: Tensor,
        weights: LayerWeights,
        out: Tensor | None,
        keys: Tensor,
        values: Tensor,
        *,
        routed: Tensor | None,
        branch: Tensor | None,
        gain: float,
    ) -> Tensor:
        """(B, Q, d) the learners' outputs, weighed and summed, added to a branch.

        Views are as few as can be: for one query, they and their Python are most of what this costs on a CPU.

        Args:
            query: (B, Q, d).
            weights, out, values: of the layer, as in `LayerMade`.
            keys: (B, H, N, D), rotated.
            routed: (B, Q, L) or (L,) router weights; None for a single learner.
            branch: (B, Q, d) to add them to.
        """
        (batch, count, _), (learners, rank, _) = query.shape, weights.q_up.shape
        every, head_dim = keys.shape[2:]
        q = weights.queries(query)
        if self.turn is None:
            q = q.view(learners, batch, count, -1, head_dim).permute(1, 3, 0, 2, 4)
            q = q if self.angles is None else rotate(q, self.angles)
        else:  # one query: of one sample nothing is copied
            q = q.view(learners, batch, -1).transpose(0, 1).reshape(batch, -1, head_dim)
            q = torch.bmm(q, self.turn).view(batch, learners, -1, head_dim).transpose(1, 2)
        q = q.reshape(-1, learners * count, head_dim)
        keys = keys.reshape(-1, every, head_dim)
        scores = torch.baddbmm(self.attn_bias, q, _like(keys, q).transpose(1, 2), alpha=head_dim**-0.5)
        attention = _like(torch.softmax(scores, dim=-1), q)  # (B * H, L * Q, N)
        if self.active is not None:
            routed = self.active if routed is None else routed * self.active
        if self.heads is None or out is None:
            outputs = torch.bmm(attention, _like(values, q).reshape(-1, every, rank))
            outputs = outputs.view(batch, -1, learners, count, rank)
            if count == 1 and routed is not None:  # heads are added up and weighed by one product
                outputs = outputs.squeeze(3).transpose(1, 2).reshape(batch * learners, -1, rank)
                shares = _like(routed.expand(batch, 1, -1).reshape(-1, 1, 1), outputs)
                low, routed = torch.bmm(shares.expand(-1, -1, outputs.shape[1]), outputs), None
            else:
                low = outputs.sum(dim=1).transpose(1, 2)  # (B, Q, L, r)
        else:
            factors = torch.bmm(attention.view(batch, -1, every), _like(values, q)).view(-1, learners * count, rank)
            kept = torch.cat([torch.bmm(attention, self.heads), factors], dim=-1)  # (B * H, L * Q, D + r)
            kept = kept.view(batch, -1, learners, count, kept.shape[-1]).permute(2, 0, 3, 1, 4)
            low = torch.bmm(kept.reshape(learners, batch * count, -1), out).transpose(0, 1)  # (B * Q, L, r)
            low = low.view(batch, count, learners, rank)
        if routed is not None:
            low = low * _like(routed.unsqueeze(-1), low)
        return project(low.reshape(batch, count, -1), weights.o_up, branch, gain)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """A tensor in the dtype of another."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


@dataclass(frozen=True, eq=False)
class StepPart:
    """What the learners add in a compiled layer. Where a cache has room for N tokens, that is the N of a step, whatever
    is in it: the rest is barred.

    Attributes:
        by: the learners.
        dtype: in which products are computed.
        place: (1,) of the layer among those that `out`, `keys` and `values` are of.
        out, keys, values: of all layers, as in `Made`.
        inputs: of all layers of this kind.
        tokens: (B, N, d) input tokens, owners: (B, N, L), key_angles: of all tokens; where keys are made of factors.
    """

    by: LayerLearners
    dtype: torch.dtype
    place: Tensor
    out: Tensor | None
    keys: Tensor
    values: Tensor
    inputs: StepInputs
    tokens: Tensor | None
    owners: Tensor | None
    key_angles: Angles | None

    @property
    def is_few(self) -> bool:
        return True

    @property
    def wants_sums(self) -> bool:
        return self.by.wants_sums

    def add(self, stream: Tensor, branch: Tensor, sums: Tensor | None) -> Tensor:
        query, head_dim = self.by.query(stream, branch), self.by.head_dim
        # put together here, where it is fused with what comes behind: slices of what is kept differ by their place
        (weights,) = Weights.of([self.by.learners()], self.dtype).layers
        keys, values = (each.index_select(1, self.place).squeeze(1) for each in (self.keys, self.values))
        if self.tokens is not None and self.owners is not None:
            keys = raised(self.tokens, keys, self.owners, weights)
            keys = keys.unflatten(-1, (-1, head_dim)).transpose(1, 2)
            keys = keys if self.key_angles is None else rotate(keys, self.key_angles)
        out = None if self.out is None else self.out.index_select(0, self.place).squeeze(0)
        routed = None if self.by.router is None else self.by.router(sums)
        gain = self.by.config.gain
        return self.inputs.attend(query, weights, out, keys, values, routed=routed, branch=branch, gain=gain)


def _filled(x: Tensor, dim: int, room: int | None) -> Tensor:
    """A tensor of tokens filled up to those that a cache has room for, if its size is fixed."""
    return _barred(x, dim, room, 0.0)


def _barred(x: Tensor, dim: int, room: int | None, value: float) -> Tensor:
    if room is None:
        return x
    # in memory of its own also where it is full: strides of what lies in a cache that grows change as it does
    whole = x.new_full((*x.shape[:dim], room, *x.shape[dim + 1 :]), value)
    whole.narrow(dim, 0, x.shape[dim]).copy_(x)
    return whole


@dataclass(eq=False)
class DecodeEngine(Engine):
    """What the layers of one forward of few tokens share.

    Attributes:
        config: of the learners, as far as layers that share an engine have it in common.
        like: (B, Q, d) input tokens of the new ones, in the dtype and on the device of all.
        head_dim: D.
        known: all tokens as the host knows them, where keys are raised segment by segment: on a CPU, where operators
            are cheap.
        attn_bias: (B * H or 1, L * Q, N) additive: 0, or a very low number where the query may not attend to the token.
        active: (B, Q, L): 1 where a query attends to any token, 0 elsewhere; None where all do.
    """

    config: WingsConfig
    like: Tensor
    head_dim: int
    known: KnownTokens | None
    attn_bias: Tensor
    active: Tensor | None
    _angles: dict[tuple[str, Which], Angles | None] = field(default_factory=dict)
    _turns: dict[str, Tensor | None] = field(default_factory=dict)
    _made: dict[str, Made | None] = field(default_factory=dict)
    _of_kind: dict[tuple[str, bool], StepInputs] = field(default_factory=dict)

    @classmethod
    def plan(cls, ctx: ForwardContext, config: WingsConfig, head_dim: int) -> DecodeEngine:
        """The engine of a forward of few tokens."""
        every, new = ctx.all_tokens, ctx.tokens
        if ctx.past_tokens is None and not config.system_keys and "textual" in config.learners:
            check_roles(every.role.cpu().numpy())
        assert ctx.inputs is not None, "the first decoder layer has not been entered"
        like, dtype, active = prepared(ctx.inputs, config), compute_dtype(ctx.inputs), None
        # a step behind an image attends to the image and to itself
        is_step = not ctx.new_media and all(ctx.has_media)
        if is_step and new.shape[1] == 1:  # the last token is behind all: to whose keys it attends is all there is
            key = cls, config.learners, config.system_keys, dtype
            bias = ctx.facts_of_tokens(key, lambda of: _bias(_owners(of, config, dim=1), dtype))
        else:
            # padding stands at -1: as a query it is behind no token, as a key it is chosen by nobody
            is_behind = every.position[:, None, :] <= new.position[:, :, None]
            legal = []
            for learner in config.learners:
                attends = is_behind & keys_of(learner, every, config)[:, None, :]
                if learner == "textual" and config.gate == "exact" and not is_step:
                    attends = attends & every.has_seen[:, -new.shape[1] :, None]
                legal.append(attends)
            allowed = torch.stack(legal, dim=1)
            bias = _bias(allowed, dtype).flatten(1, 2)
            active = None if is_step else allowed.any(dim=-1).transpose(1, 2)
        if len(bias) > 1:  # one sample's is broadcast
            heads = like.shape[-1] // head_dim
            bias = bias[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
        known = ctx.known() if like.device.type == "cpu" and config.cache == "factors" else None
        return cls(config, like, head_dim, known, bias, active)

    def prepare(self, learners: LayerLearners, ctx: ForwardContext) -> None:
        """Add the new tokens to the cache for all layers at once."""
        super().prepare(learners, ctx)
        name = learners.graft_name
        if name not in self._made:
            siblings = learners.siblings
            weights = siblings.weights(self.like, fresh=ctx.past_tokens is None)
            is_shared = weights is not None and siblings.share_keys
            self._made[name] = self._make(siblings.layers, weights, ctx) if weights and is_shared else None

    @torch.compiler.disable  # lengths change with every step, and each would be compiled anew
    def attend(
        self, learners: LayerLearners, ctx: ForwardContext, query: Tensor, branch: Tensor | None = None
    ) -> Tensor:
        made, place = self._placed(learners, ctx)
        weights, out, keys, values = made.layers[place]
        routed = learners.router_weights(ctx)
        if learners.config.cache == "factors":
            keys = self._expand_keys(keys, weights, learners, ctx)
        inputs, gain = self._inputs(learners, ctx), learners.config.gain
        return inputs.attend(query, weights, out, keys, values, routed=routed, branch=branch, gain=gain)

    def _placed(self, learners: LayerLearners, ctx: ForwardContext) -> tuple[Made, int]:
        """What was made for the layers of a graft, or is made for this one alone, and which of them it is."""
        made = self._made[learners.graft_name]
        if made is None:
            return self._make([learners], learners.siblings.of_layer(learners, self.like), ctx), 0
        return made, learners.place

    def _inputs(self, learners: LayerLearners, ctx: ForwardContext) -> StepInputs:
        kind = learners.layer_type, learners.keeps_outputs
        if kind not in self._of_kind:
            turn = self._turn(learners, ctx)
            angles = self._new_angles(learners, ctx) if turn is None else None
            heads = None if learners.keeps_outputs else self._heads(ctx)
            self._of_kind[kind] = StepInputs(heads, self.attn_bias, self.active, angles, turn)
        return self._of_kind[kind]

    def part(self, learners: LayerLearners, ctx: ForwardContext) -> StepPart:
        made, place = self._placed(learners, ctx)
        room = ctx.room
        angles, expands = None, learners.config.cache == "factors"
        if expands and (every := self.angles(learners, ctx, "all")) is not None:
            angles = Angles(ctx.once(_filled, every.cos, 2, room), ctx.once(_filled, every.sin, 2, room))
        return StepPart(
            learners,
            compute_dtype(self.like),
            learners.siblings.place_on(self.like.device, place),
            made.out,
            ctx.once(_filled, made.keys, made.keys.dim() - 2, room),
            ctx.once(_filled, made.values, made.values.dim() - 2, room),
            self._filled_inputs(learners, ctx, room),
            ctx.once(_filled, self.tokens(ctx), 1, room) if expands else None,
            ctx.once(_filled, self.owners(ctx), 1, room) if expands else None,
            angles,
        )

    def _filled_inputs(self, learners: LayerLearners, ctx: ForwardContext, room: int | None) -> StepInputs:
        """Those of a layer, filled up to the tokens that a cache has room for."""
        inputs, barred = self._inputs(learners, ctx), torch.finfo(self.attn_bias.dtype).min / 2
        heads = None if inputs.heads is None else ctx.once(_filled, inputs.heads, 1, room)
        bias = ctx.once(_barred, inputs.attn_bias, 2, room, barred)
        # compiled, angles are fused with what stands around them
        return StepInputs(heads, bias, inputs.active, self._new_angles(learners, ctx), None)

    # -- keys and values: made of their tokens; what they are made of, or they themselves, is kept in the cache ------

    def _make(self, layers: Sequence[LayerLearners], weights: Weights, ctx: ForwardContext) -> Made:
        """Factors of all tokens' keys and values in some layers, or what is made of them; the cache gets those of new
        ones."""
        config, count = layers[0].config, len(layers)
        name, indices = layers[0].graft_name, [layer.index for layer in layers]
        is_cached = ctx.is_cached(name, indices[0])
        tokens = self.like if is_cached else self.tokens(ctx)
        batch, new = tokens.shape[:2]
        # text alone is made by its learner; where there is none, what is made is nobody's key
        is_text = is_cached and not ctx.new_media
        makers = [config.learners.index("textual")] if is_text and "textual" in config.learners else [0]
        makers = makers if is_text else list(range(len(config.learners)))
        owners = None if len(makers) == 1 else ctx.all_tokens.last(new).is_perceptual[..., None]
        low = by_owner(owners, [F.linear(tokens, weights.kv_down[maker]) for maker in makers])
        low = low.view(batch, new, count, 2, config.rank).permute(3, 0, 2, 1, 4)  # (2, B, layers, new, r)
        if config.cache == "factors":
            keys, values = ctx.to_cache(name, indices, low[0], low[1])
        else:
            flat = low[0].transpose(0, 1).reshape(count, batch * new, config.rank)
            every = tokens.reshape(1, batch * new, -1).expand(count, -1, -1)
            made = [torch.baddbmm(every, flat, weights.k_up[:, maker]) for maker in makers]
            spread = [each.view(count, batch, new, -1) for each in made]
            own = by_owner(owners, spread).unflatten(-1, (-1, self.head_dim)).transpose(2, 3)
            # the layers share keys
            turn = self._turn(layers[0], ctx) if is_cached else None
            if turn is not None:
                own = torch.bmm(own.transpose(0, 1).reshape(batch, -1, self.head_dim), turn)
            elif (turned := self.angles(layers[0], ctx, "new" if is_cached else "all")) is not None:
                own = rotate(own, turned).transpose(0, 1)
            else:
                own = own.transpose(0, 1)
            own = own.reshape(batch, -1, new, self.head_dim)
            if layers[0].keeps_outputs:
                by, factors = weights.outputs(self.head_dim), low[1].transpose(1, 2)
                at = None if owners is None else owners[:, None]
                outputs = by_owner(at, [by.made(maker, tokens, factors) for maker in makers])
                keys, values = ctx.to_cache(name, indices, own, outputs)
                keys, values = (each.view(batch, count, -1, *each.shape[2:]) for each in (keys, values))
                return Made(weights.layers, None, keys, values)
            keys, values = ctx.to_cache(name, indices, own, low[1])
            keys = keys.view(batch, count, -1, *keys.shape[2:])
        return Made(weights.layers, weights.out_of_kept(self.head_dim), keys, values)

    def _expand_keys(
        self, factors: Tensor, weights: LayerWeights, learners: LayerLearners, ctx: ForwardContext
    ) -> Tensor:
        """(B, H, N, D) rotated keys of all tokens: input tokens plus `k.up` of their (B, N, r) factors."""
        angles, buffers = self.angles(learners, ctx, "all"), self._buffers(ctx)
        if self.segments is None:
            keys = raised(self.tokens(ctx), factors, self.owners(ctx), weights)
        else:
            keys = buffers[0].copy_(self.tokens(ctx))
            low = factors.to(keys.dtype)  # what was kept may come from under autocast
            for start, stop, learner in self.segments:
                if learner >= 0:
                    up = weights.kv_up[learner, 0].to(keys.dtype)
                    keys[:, start:stop].baddbmm_(low[:, start:stop], up.expand(len(low), -1, -1))
        heads = keys.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads if angles is None else rotate(heads, angles, out=buffers[1])

    def angles(self, learners: LayerLearners, ctx: ForwardContext, which: Which) -> Angles | None:
        """Angles for heads of (B, H, tokens, D), of the new tokens or of all. None without RoPE."""
        if not learners.config.rope:
            return None
        name = learners.layer_type, which
        if name not in self._angles:
            halves = ctx.all_half_rope(name[0]) if which == "all" else ctx.new_half_rope(name[0])
            angles = None
            if halves is not None:
                # every n-th angle: see `narrow_angles`
                step = learners.host_head_dim // learners.head_dim
                cos, sin = (half[:, None, :, ::step].to(self.like.dtype) for half in halves)
                angles = Angles(torch.cat([cos, cos], dim=-1), sin)
            self._angles[name] = angles
        return self._angles[name]

    def _new_angles(self, learners: LayerLearners, ctx: ForwardContext) -> Angles | None:
        """Of the new tokens, for (B, H, L, Q, D)."""
        angles = self.angles(learners, ctx, "new")
        return None if angles is None else Angles(angles.cos[:, :, None], angles.sin[:, :, None])

    def _turn(self, learners: LayerLearners, ctx: ForwardContext) -> Tensor | None:
        """(B, D, D) see `Siblings.turn`; None for several tokens per sample, without RoPE, and where products are
        rounded to another dtype than angles are in."""
        kind, (batch, count, _) = learners.layer_type, self.like.shape
        if kind not in self._turns:
            turn = None
            if count == 1 and learners.config.rope and kind in ctx.rope and self.attn_bias.dtype == self.like.dtype:
                tables = narrow_angles(ctx.rope[kind], learners.host_head_dim, self.head_dim)
                cos, sin = (_like(table, self.like) for table in tables)
                turn = learners.siblings.turn(cos, sin, self.head_dim).expand(batch, -1, -1)
            self._turns[kind] = turn
        return self._turns[kind]

    # -- of all tokens: what needs none of it makes none ------------------------------------------------------------

    @cached_property
    def segments(self) -> list[Segment] | None:
        """Of all tokens, where they are few and the same in all samples."""
        return None if self.known is None else _segments(self.known, self.config.learners)

    def tokens(self, ctx: ForwardContext) -> Tensor:
        """(B, N, d) input tokens."""
        return ctx.once(prepared, ctx.all_inputs(), self.config)

    def owners(self, ctx: ForwardContext) -> Tensor:
        """(B, N, L) bool: the token is a key of the learner."""
        return ctx.once(_owners, ctx.all_tokens, self.config, -1)

    def _heads(self, ctx: ForwardContext) -> Tensor:
        """(B * H, N, D) the input tokens, each head's side by side: every layer reads all of them."""
        return ctx.once(_side_by_side, self.tokens(ctx), self.head_dim).to(self.attn_bias.dtype)

    def _buffers(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """(B, N, d) and (B, H, N, D) tensors for every layer to write its keys to: fresh memory of this size costs more
        in page faults than what is computed into it."""
        return ctx.once(_buffers_for, self.tokens(ctx), self.head_dim)


def _owners(tokens: TokenMap, config: WingsConfig, dim: int) -> Tensor:
    """(B, tokens, L), or (B, L, tokens) bool: the token is a key of the learner; learners along that dimension."""
    return torch.stack([keys_of(learner, tokens, config) for learner in config.learners], dim=dim)


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where something is allowed, elsewhere half of the lowest number: what is added to it overflows in no dtype."""
    # of float32's where that is higher: numbers come in it
    barred = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
    return torch.where(allowed, 0.0, barred).to(dtype)


def _side_by_side(tokens: Tensor, head_dim: int) -> Tensor:
    heads = tokens.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads.reshape(-1, *heads.shape[2:])


def _buffers_for(tokens: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    batch, count, width = tokens.shape
    return torch.empty_like(tokens), tokens.new_empty(batch, width // head_dim, count, head_dim)


def _segments(known: KnownTokens, learners: Sequence[str]) -> list[Segment] | None:
    """Segments of perceptual and other tokens, where they are few and the same in all samples."""
    perceptual = known.is_perceptual
    if not (perceptual == perceptual[:1]).all():
        return None
    lengths = segment_lengths(perceptual[0])
    if len(lengths) > MOST_SEGMENTS:
        return None
    indices = [learners.index(name) if name in learners else -1 for name in ("textual", "visual")]
    starts_perceptual = bool(perceptual[0, 0])
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return [Segment(start, stop, indices[starts_perceptual ^ bool(i % 2)]) for i, (start, stop) in enumerate(bounds)]
