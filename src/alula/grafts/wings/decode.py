"""Learners for few queries, all of a layer at once: what a step of decoding computes.

While prefilling each learner attends by itself through a fused kernel (`prefill`). For few queries, launching
operations costs more than what they compute, and gathering costs more than attending. So all learners attend to one
table of keys, in the order of the tokens, in which every token's key is made by the learner it is a key of; what a
query may not attend to is masked. Masks are (B, learners * Q, tokens) with Q below a head's width: nothing grows with
the square of the tokens.

Shapes: B batch, Q new tokens, N = P + Q all tokens, d stream width, H heads, D their width, L learners, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.learners import (
    MOST_SEGMENTS,
    Angles,
    Engine,
    LayerLearners,
    LoRRA,
    keys_of,
    prepared,
    rotate,
    segment_lengths,
)
from alula.seam import ForwardContext

Which = Literal["new", "all", "queries"]


class Segment(NamedTuple):
    """Tokens `start` to `stop` are keys of the learner of this index; -1: of none."""

    start: int
    stop: int
    learner: int


@dataclass(eq=False)
class DecodeEngine(Engine):
    """What the layers of one forward of few tokens share.

    Attributes:
        tokens: (B, N, d) input tokens.
        head_dim: D.
        segments: of all tokens, where they are few and the same in all samples.
        new_segments: of the new tokens, where they are few and the same in all samples; counted from the first new one.
        attn_bias: (B, 1, L * Q, N) additive: 0, or the lowest number where the query may not attend to the token.
        active: (B, Q, L): 1 where a query attends to any token, 0 elsewhere; None where all do.
    """

    tokens: Tensor
    head_dim: int
    segments: list[Segment] | None
    new_segments: list[Segment]
    attn_bias: Tensor
    active: Tensor | None
    _angles: dict[tuple[str, Which], Angles | None] = field(default_factory=dict)

    @classmethod
    def plan(cls, ctx: ForwardContext, config: WingsConfig, head_dim: int) -> DecodeEngine | None:
        """The engine of a forward of few tokens.

        None where learners have to attend one by one: samples differ in where their images stand, or these are many,
        and keys have to be made for that.
        """
        every, new = ctx.all_tokens, ctx.tokens
        past = every.shape[1] - new.shape[1]
        if config.cache == "keys":
            new_segments, segments = _segments(new.is_perceptual, config.learners), None
            if past == 0:
                segments = new_segments
        else:
            segments = _segments(every.is_perceptual, config.learners)
            new_segments = segments and [
                Segment(max(s.start - past, 0), s.stop - past, s.learner) for s in segments if s.stop > past
            ]
        if new_segments is None:
            return None
        # padding stands at -1: as a query it is behind no token, as a key it is chosen by nobody
        is_behind = every.position[:, None, :] <= new.position[:, :, None]
        legal = []
        for learner in config.learners:
            attends = is_behind & keys_of(learner, every, config)[:, None, :]
            if learner == "textual" and config.gate == "exact":
                attends = attends & every.has_seen[:, past:, None]
            legal.append(attends)
        allowed = torch.stack(legal, dim=1)
        active = allowed.any(dim=-1).transpose(1, 2)
        tokens = prepared(ctx.all_inputs(), config)
        # in half precision the lowest number and a score overflow
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return cls(
            tokens=tokens,
            head_dim=head_dim,
            segments=segments,
            new_segments=new_segments,
            attn_bias=tokens.new_zeros(allowed.shape, dtype=wide)
            .masked_fill_(~allowed, torch.finfo(wide).min)
            .flatten(1, 2)[:, None],
            active=None if bool(active.all()) else active,
        )

    def fits(self, learners: LayerLearners, ctx: ForwardContext) -> bool:
        """Whether a layer can attend so: keys that no cache holds have to be made, segment by segment."""
        return bool(self.segments) or ctx.is_cached(learners.graft_name, learners.index)

    @torch.compiler.disable  # lengths change with every step, and each would be compiled anew
    def attend(self, learners: LayerLearners, ctx: ForwardContext, query: Tensor) -> Tensor:
        modules = [learners.learner(name) for name in learners.config.learners]
        keys, value_factors = self._keys_and_factors(learners, modules, ctx)
        weights = None if learners.router is None else learners.router_weights(ctx)
        return self._attend(modules, query, keys, value_factors, self.angles(learners, ctx, "queries"), weights)

    def _keys_and_factors(
        self, learners: LayerLearners, modules: Sequence[LoRRA], ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) rotated keys and (B, N, r) value factors of all tokens; the cache gets those of new ones."""
        owner = learners.graft_name, learners.index
        is_cached = ctx.is_cached(*owner)
        tokens = self.tokens[:, -ctx.tokens.shape[1] :] if is_cached else self.tokens
        segments = self.new_segments if is_cached else self.segments
        assert segments is not None
        key_factors, value_factors = _factors(modules, tokens, segments)[:, None].chunk(2, dim=-1)
        if learners.config.cache == "keys":
            angles = self.angles(learners, ctx, "new" if is_cached else "all")
            new = _expand_keys(modules, tokens, key_factors[:, 0], segments, angles)
            keys, value_factors = ctx.to_cache(*owner, new, value_factors)
        else:
            key_factors, value_factors = ctx.to_cache(*owner, key_factors, value_factors)
            assert self.segments is not None
            angles = self.angles(learners, ctx, "all")
            keys = _expand_keys(modules, self.tokens, key_factors[:, 0], self.segments, angles, self._buffers)
        return keys, value_factors[:, 0]

    def _attend(
        self,
        modules: Sequence[LoRRA],
        query: Tensor,
        keys: Tensor,
        value_factors: Tensor,
        angles: Angles | None,
        weights: Tensor | None,
    ) -> Tensor:
        """(B, Q, d) the sum of the learners' outputs.

        Args:
            query: (B, Q, d).
            keys: (B, H, N, D) and value_factors: (B, N, r), of all tokens.
            angles: of the queries, once for every learner.
            weights: (B, Q, L) or (L,) of the learners; None = 1.
        """
        count = query.shape[1]
        queries = torch.cat([query + module.q(query) for module in modules], dim=1) * self.head_dim**-0.5
        q = modules[0].heads(queries)  # (B, H, L * Q, D)
        if angles is not None:
            q = rotate(q, angles)
        scores = q @ keys.to(q.dtype).transpose(-1, -2) + self.attn_bias
        attention = torch.softmax(scores, dim=-1).to(query.dtype)  # (B, H, L * Q, N)
        attended = attention @ self._heads  # (B, H, L * Q, D)
        value_factors = value_factors.to(attention.dtype)  # what was kept may come from under autocast
        # (B, H, L * Q, r)
        attended_factors = (attention.flatten(1, 2) @ value_factors).unflatten(1, attention.shape[1:3])
        if self.active is not None:
            weights = self.active if weights is None else weights * self.active
        total = None
        for index, module in enumerate(modules):
            own = slice(index * count, (index + 1) * count)
            up = module.v.up.to(query.dtype).unflatten(0, (-1, self.head_dim))  # (H, D, r)
            values = attended[:, :, own] + attended_factors[:, :, own] @ up.transpose(-1, -2)
            low = module.o.apply_down(values.transpose(1, 2).flatten(2))
            if weights is not None:
                low = low * weights[..., index : index + 1].to(low.dtype)
            output = module.o.apply_up(low)
            total = output if total is None else total + output
        assert total is not None
        return total

    def angles(self, learners: LayerLearners, ctx: ForwardContext, which: Which) -> Angles | None:
        """Angles for heads of (B, H, tokens, D), of the new tokens, of all, or of the queries: the new tokens once for
        every learner. None without RoPE."""
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
                times = self.attn_bias.shape[2] // cos.shape[2] if which == "queries" else 1
                angles = Angles(torch.cat([cos, cos], dim=-1).repeat(1, 1, times, 1), sin.repeat(1, 1, times, 1))
            self._angles[name] = angles
        return self._angles[name]

    @cached_property
    def _heads(self) -> Tensor:
        """(B, H, N, D) the input tokens, each head's side by side: every layer reads all of them."""
        return self.tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).contiguous()

    @cached_property
    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Two (B, N, d) tensors for every layer to write its keys to: fresh memory of this size costs more in page
        faults than what is computed into it."""
        return torch.empty_like(self.tokens), torch.empty_like(self.tokens)


def _segments(perceptual: Tensor, learners: Sequence[str]) -> list[Segment] | None:
    """Segments of perceptual and other tokens in (B, tokens), where they are few and the same in all samples."""
    if len(perceptual) > 1 and not bool((perceptual == perceptual[:1]).all()):
        return None
    lengths = segment_lengths(perceptual[0])
    if len(lengths) > MOST_SEGMENTS:
        return None
    indices = [learners.index(name) if name in learners else -1 for name in ("textual", "visual")]
    starts_perceptual = bool(perceptual[0, 0])
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return [Segment(start, stop, indices[starts_perceptual ^ bool(i % 2)]) for i, (start, stop) in enumerate(bounds)]


def _factors(modules: Sequence[LoRRA], tokens: Tensor, segments: Sequence[Segment]) -> Tensor:
    """(B, tokens, 2 r) factors of (B, tokens, d), each by the learner it is a key of, or any."""
    if len(segments) == 1:
        return modules[segments[0].learner].factors(tokens)
    return torch.cat([modules[s.learner].factors(tokens[:, s.start : s.stop]) for s in segments], dim=1)


def _expand_keys(
    modules: Sequence[LoRRA],
    tokens: Tensor,
    factors: Tensor,
    segments: Sequence[Segment],
    angles: Angles | None,
    buffers: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(B, H, tokens, D) rotated keys: input tokens plus `k.up` of their factors.

    Args:
        tokens: (B, tokens, d); what is nobody's key is left as it is.
        factors: (B, tokens, r).
        buffers: two tensors like `tokens` that may be written to.
    """
    keys = tokens.clone() if buffers is None else buffers[0].copy_(tokens)
    for segment in segments:
        if segment.learner >= 0:
            # under autocast factors are half, the tokens are not
            low = factors[:, segment.start : segment.stop].to(keys.dtype)
            up = modules[segment.learner].k.up.to(keys.dtype).T
            keys[:, segment.start : segment.stop].baddbmm_(low, up.expand(len(low), -1, -1))
    heads = modules[0].heads(keys)
    if angles is None:
        return heads
    return rotate(heads, angles, out=None if buffers is None else modules[0].heads(buffers[1]))
