"""Learners for few queries, all of a layer at once: what a step of decoding computes.

While prefilling each learner attends by itself through a fused kernel (`prefill`). For few queries, launching
operations costs more than what they compute, and gathering costs more than attending. So all learners attend to one
table of keys, in the order of the tokens, in which every token's key is made by the learner it is a key of; what a
query may not attend to is masked. Masks are (B, learners * Q, tokens) with Q below a head's width: nothing grows with
the square of the tokens.

Values are never made: sum_j p_j (x_j + up_v z_j) = sum_j p_j x_j + up_v sum_j p_j z_j. What new tokens add to the cache
is made for all layers at once.

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
    prepared,
    project,
    rotate,
    segment_lengths,
)
from alula.grafts.wings.stacked import LayerWeights, Weights, compute_dtype
from alula.seam import ForwardContext
from alula.tokens import KnownTokens

Which = Literal["new", "all"]


class Segment(NamedTuple):
    """Tokens `start` to `stop` are keys of the learner of this index; -1: of none."""

    start: int
    stop: int
    learner: int


@dataclass(frozen=True)
class Made:
    """What the layers of one graft share in a forward, by layer.

    Attributes:
        weights: of their learners.
        v_up: (layers, H * L, r, D), up to values, by head.
        keys: (B, layers, N, r) factors of keys; (B, layers, H, N, D) rotated keys where the cache holds these.
        values: (B, layers, N, r) factors of values.
    """

    weights: list[LayerWeights]
    v_up: Tensor
    keys: Tensor
    values: Tensor


def raised(tokens: Tensor, factors: Tensor, owners: Tensor, weights: LayerWeights) -> Tensor:
    """(B, N, d) keys of (B, N, d) tokens, not rotated: plus `k.up` of their (B, N, r) factors, by the learner whose key
    each is."""
    own = (factors.to(tokens.dtype)[:, :, None] * owners[..., None]).flatten(2)
    ups = weights.kv_up[:, 0].flatten(0, 1).to(tokens.dtype)
    return torch.baddbmm(tokens, own, ups.expand(len(own), -1, -1))


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What the learners of one layer need beside their keys.

    Attributes:
        weights: of the learners.
        v_up: (H * L, r, D) up to values, by head.
        values: (B, N, r) factors of values.
        heads: (B * H, N, D) the input tokens, each head's side by side.
        attn_bias: (B * H, L * Q, N), as in `DecodeEngine`.
        active: (B, Q, L), likewise.
        angles: of the new tokens.
    """

    weights: LayerWeights
    v_up: Tensor
    values: Tensor
    heads: Tensor
    attn_bias: Tensor
    active: Tensor | None
    angles: Angles | None

    def attend(self, query: Tensor, keys: Tensor, routed: Tensor | None, branch: Tensor | None, gain: float) -> Tensor:
        """(B, Q, d) the learners' outputs, weighed and summed, added to a branch.

        Args:
            query: (B, Q, d).
            keys: (B, H, N, D), rotated.
            routed: (B, Q, L) or (L,) router weights; None for a single learner.
            branch: (B, Q, d) to add them to.
        """
        weights, (batch, count, width), head_dim = self.weights, query.shape, self.v_up.shape[-1]
        q = self._queries(query, head_dim)
        keys = keys.reshape(-1, *keys.shape[2:]).to(q.dtype)
        scores = torch.baddbmm(self.attn_bias, q, keys.transpose(-1, -2), alpha=head_dim**-0.5)
        attention = torch.softmax(scores, dim=-1).to(q.dtype)  # (B * H, L * Q, N)
        attended = self._by_head(attention @ self.heads, batch, width // head_dim)
        factors = attention.view(batch, -1, attention.shape[-1]) @ self.values.to(attention.dtype)
        factors = self._by_head(factors, batch, width // head_dim)
        values = torch.baddbmm(attended, factors, self.v_up)  # (H * L, B * Q, D)
        learned = len(weights.q_up)
        values = values.unflatten(0, (-1, learned)).permute(1, 2, 0, 3).reshape(learned, batch * count, width)
        low = torch.bmm(values, weights.o_down)  # (L, B * Q, r)
        if self.active is not None:
            routed = self.active if routed is None else routed * self.active
        if routed is not None:
            low = low * routed.expand(batch, count, -1).reshape(batch * count, -1).T[..., None].to(low.dtype)
        low = low.transpose(0, 1).reshape(batch, count, -1)
        return project(low, weights.o_up, branch, gain)

    def _queries(self, x: Tensor, head_dim: int) -> Tensor:
        """(B * H, L * Q, D) of (B, Q, d), projected and rotated for every learner."""
        (batch, count, _), learners = x.shape, len(self.weights.q_up)
        q = self.weights.queries(x).view(learners, batch, count, -1, head_dim).permute(1, 3, 0, 2, 4)
        if self.angles is not None:
            q = rotate(q, Angles(self.angles.cos[:, :, None], self.angles.sin[:, :, None]))
        return q.reshape(-1, learners * count, head_dim)

    def _by_head(self, x: Tensor, batch: int, heads: int) -> Tensor:
        """(H * L, B * Q, C) of what is (B, H, L, Q, C) in memory."""
        x = x.view(batch, heads, len(self.weights.q_up), -1, x.shape[-1])
        return x.permute(1, 2, 0, 3, 4).reshape(-1, batch * x.shape[3], x.shape[-1])


@dataclass(frozen=True, eq=False)
class StepPart:
    """What the learners add in a compiled layer. Where a cache has room for N tokens, that is the N of a step, whatever
    is in it: the rest is barred.

    Attributes:
        by: the learners.
        dtype: in which products are computed.
        place: (1,) of the layer among those that `keys` and `values` are of.
        keys, values: of all layers, as in `Made`.
        heads, attn_bias, active, angles: as in `StepInputs`.
        tokens: (B, N, d) input tokens, owners: (B, N, L), key_angles: of all tokens; where keys are made of factors.
    """

    by: LayerLearners
    dtype: torch.dtype
    place: Tensor
    keys: Tensor
    values: Tensor
    heads: Tensor
    attn_bias: Tensor
    active: Tensor | None
    angles: Angles | None
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
        weights = Weights.of([self.by.learners()], self.dtype)
        keys, values = (each.index_select(1, self.place).squeeze(1) for each in (self.keys, self.values))
        if self.tokens is not None and self.owners is not None:
            keys = raised(self.tokens, keys, self.owners, weights.layers[0])
            keys = keys.unflatten(-1, (-1, head_dim)).transpose(1, 2)
            keys = keys if self.key_angles is None else rotate(keys, self.key_angles)
        inputs = StepInputs(
            weights.layers[0],
            weights.v_up_by_head(head_dim)[0],
            values,
            self.heads,
            self.attn_bias,
            self.active,
            self.angles,
        )
        routed = None if self.by.router is None else self.by.router(sums)
        return inputs.attend(query, keys, routed, branch, self.by.config.gain)


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
        tokens: (B, N, d) input tokens.
        head_dim: D.
        segments: of all tokens, where they are few and the same in all samples and operators are cheap: on a CPU.
        owners: (B, N, L) bool: the token is a key of the learner.
        attn_bias: (B * H, L * Q, N) additive: 0, or a very low number where the query may not attend to the token.
        active: (B, Q, L): 1 where a query attends to any token, 0 elsewhere; None where all do.
    """

    tokens: Tensor
    head_dim: int
    segments: list[Segment] | None
    owners: Tensor
    attn_bias: Tensor
    active: Tensor | None
    _angles: dict[tuple[str, Which], Angles | None] = field(default_factory=dict)
    _made: dict[str, Made | None] = field(default_factory=dict)

    @classmethod
    def plan(cls, ctx: ForwardContext, config: WingsConfig, head_dim: int) -> DecodeEngine:
        """The engine of a forward of few tokens."""
        every, new = ctx.all_tokens, ctx.tokens
        if ctx.past_tokens is None and not config.system_keys and "textual" in config.learners:
            check_roles(every.role.cpu().numpy())
        # padding stands at -1: as a query it is behind no token, as a key it is chosen by nobody
        is_behind = every.position[:, None, :] <= new.position[:, :, None]
        owners = [keys_of(learner, every, config) for learner in config.learners]
        legal = []
        for learner, keys in zip(config.learners, owners, strict=True):
            attends = is_behind & keys[:, None, :]
            if learner == "textual" and config.gate == "exact":
                attends = attends & every.has_seen[:, -new.shape[1] :, None]
            legal.append(attends)
        allowed = torch.stack(legal, dim=1)
        tokens = prepared(ctx.all_inputs(), config)
        # a step behind an image attends to the image and to itself
        is_step = not ctx.new_media and all(ctx.has_media)
        # half of the lowest number: what is added to it overflows in no dtype
        barred = torch.finfo(compute_dtype(tokens)).min / 2
        bias = tokens.new_zeros(allowed.shape, dtype=compute_dtype(tokens)).masked_fill_(~allowed, barred)
        heads = tokens.shape[-1] // head_dim
        return cls(
            tokens=tokens,
            head_dim=head_dim,
            segments=_segments(ctx.known(), config.learners) if tokens.device.type == "cpu" else None,
            owners=torch.stack(owners, dim=-1),
            attn_bias=bias.flatten(1, 2)[:, None].expand(-1, heads, -1, -1).flatten(0, 1),
            active=None if is_step else allowed.any(dim=-1).transpose(1, 2),
        )

    def prepare(self, learners: LayerLearners, ctx: ForwardContext) -> None:
        """Add the new tokens to the cache for all layers at once."""
        super().prepare(learners, ctx)
        name = learners.graft_name
        if name not in self._made:
            siblings = learners.siblings
            weights = siblings.weights(self.tokens, fresh=ctx.past_tokens is None)
            is_shared = weights is not None and siblings.share_keys
            self._made[name] = self._make(siblings.layers, weights, ctx) if weights and is_shared else None

    @torch.compiler.disable  # lengths change with every step, and each would be compiled anew
    def attend(
        self, learners: LayerLearners, ctx: ForwardContext, query: Tensor, branch: Tensor | None = None
    ) -> Tensor:
        made, place = self._placed(learners, ctx)
        routed = None if learners.router is None else learners.router_weights(ctx)
        keys = made.keys[:, place]
        if learners.config.cache == "factors":
            keys = self._expand_keys(keys, made.weights[place], self.angles(learners, ctx, "all"))
        inputs = self._inputs(made, place, self.angles(learners, ctx, "new"))
        return inputs.attend(query, keys, routed, branch, learners.config.gain)

    def _placed(self, learners: LayerLearners, ctx: ForwardContext) -> tuple[Made, int]:
        """What was made for the layers of a graft, or is made for this one alone, and which of them it is."""
        made = self._made[learners.graft_name]
        if made is None:
            return self._make([learners], learners.siblings.of_layer(learners, self.tokens), ctx), 0
        return made, learners.siblings.layers.index(learners)

    def _inputs(self, made: Made, place: int, angles: Angles | None) -> StepInputs:
        return StepInputs(
            made.weights[place],
            made.v_up[place],
            made.values[:, place],
            self._heads,
            self.attn_bias,
            self.active,
            angles,
        )

    def part(self, learners: LayerLearners, ctx: ForwardContext) -> StepPart:
        made, place = self._placed(learners, ctx)
        room = ctx.room
        barred = torch.finfo(self.attn_bias.dtype).min / 2
        angles, expands = None, learners.config.cache == "factors"
        if expands and (every := self.angles(learners, ctx, "all")) is not None:
            angles = Angles(ctx.once(_filled, every.cos, 2, room), ctx.once(_filled, every.sin, 2, room))
        return StepPart(
            learners,
            compute_dtype(self.tokens),
            learners.siblings.place_on(self.tokens.device, place),
            ctx.once(_filled, made.keys, made.keys.dim() - 2, room),
            ctx.once(_filled, made.values, 2, room),
            ctx.once(_filled, self._heads, 1, room),
            ctx.once(_barred, self.attn_bias, 2, room, barred),
            self.active,
            self.angles(learners, ctx, "new"),
            ctx.once(_filled, self.tokens, 1, room) if expands else None,
            ctx.once(_filled, self.owners, 1, room) if expands else None,
            angles,
        )

    # -- keys: made of their tokens; what they are made of, or they themselves, is kept in the cache ----------------

    def _make(self, layers: Sequence[LayerLearners], weights: Weights, ctx: ForwardContext) -> Made:
        """Factors of all tokens' keys and values in some layers, or their keys; the cache gets those of new ones."""
        config, count = layers[0].config, len(layers)
        name, indices = layers[0].graft_name, [layer.index for layer in layers]
        is_cached = ctx.is_cached(name, indices[0])
        tokens = self.tokens[:, -ctx.tokens.shape[1] :] if is_cached else self.tokens
        batch, new = tokens.shape[:2]
        # text alone is made by its learner; where there is none, what is made is nobody's key
        is_text = is_cached and not ctx.new_media
        makers = [config.learners.index("textual")] if is_text and "textual" in config.learners else [0]
        makers = makers if is_text else list(range(len(config.learners)))
        owners = ctx.all_tokens.last(new).is_perceptual[..., None]
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
            turned = self.angles(layers[0], ctx, "new" if is_cached else "all")  # the layers share keys
            if turned is not None:
                own = rotate(own, turned)
            own = own.transpose(0, 1).reshape(batch, -1, new, self.head_dim)
            keys, values = ctx.to_cache(name, indices, own, low[1])
            keys = keys.unflatten(1, (count, -1))
        return Made(weights.layers, weights.v_up_by_head(self.head_dim), keys, values)

    def _expand_keys(self, factors: Tensor, weights: LayerWeights, angles: Angles | None) -> Tensor:
        """(B, H, N, D) rotated keys of all tokens: input tokens plus `k.up` of their (B, N, r) factors."""
        if self.segments is None:
            keys = raised(self.tokens, factors, self.owners, weights)
        else:
            keys = self._buffers[0].copy_(self.tokens)
            low = factors.to(keys.dtype)  # what was kept may come from under autocast
            for start, stop, learner in self.segments:
                if learner >= 0:
                    up = weights.kv_up[learner, 0].to(keys.dtype)
                    keys[:, start:stop].baddbmm_(low[:, start:stop], up.expand(len(low), -1, -1))
        heads = keys.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads if angles is None else rotate(heads, angles, out=self._buffers[1])

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
                cos, sin = (half[:, None, :, ::step].to(self.tokens.dtype) for half in halves)
                angles = Angles(torch.cat([cos, cos], dim=-1), sin)
            self._angles[name] = angles
        return self._angles[name]

    @cached_property
    def _heads(self) -> Tensor:
        """(B * H, N, D) the input tokens, each head's side by side: every layer reads all of them."""
        heads = self.tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads.reshape(-1, *heads.shape[2:]).to(self.attn_bias.dtype)

    @cached_property
    def _buffers(self) -> tuple[Tensor, Tensor]:
        """(B, N, d) and (B, H, N, D) tensors for every layer to write its keys to: fresh memory of this size costs more
        in page faults than what is computed into it."""
        batch, count, width = self.tokens.shape
        return torch.empty_like(self.tokens), self.tokens.new_empty(batch, width // self.head_dim, count, self.head_dim)


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
