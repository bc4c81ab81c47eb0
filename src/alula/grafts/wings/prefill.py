"""Learners for many queries, one learner at a time through a fused kernel: what a prompt or a training batch computes.

Keys and values of both learners are the decoder's input tokens (perceptual tokens for the visual learner, text tokens
for the textual one), shared by all layers. Which key a query may see is decided by true position, modality and
validity. In the order of their positions, the keys a query may see are always the first n: one number per query says
it all.

Tokens come as they stand in the prompt, text and images in turns. Put side by side (`KeyLayout`), the tokens that are
keys of one learner attend to one another as in any causal decoder, each to those before it. That needs no mask, which
lets the fastest kernels in, and no keys are gathered per learner.

What a cache keeps of a token is in two forms (`WingsConfig.cache`): the factors of its key and value, or its rotated
key and the factors of its value.

Shapes: B batch, S new tokens, P cached tokens, T queries in the order they are laid out (S, or more where samples are
filled up), K key tokens of one learner, d stream width, H heads, D their width, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.learners import (
    MOST_SEGMENTS,
    Angles,
    Engine,
    LayerLearners,
    QueryBlock,
    first_tokens,
    keys_of,
    narrow_angles,
    pick_tokens,
    prepared,
    rotate,
    segment_lengths,
    split_queries,
    zero_of,
)
from alula.seam import Branch, ForwardContext
from alula.tokens import TokenMap

PARTS = ("textual", "visual", "others")


@dataclass(frozen=True)
class LearnerKeys:
    """The keys of one learner, out of all tokens of the batch.

    Attributes:
        index: (B, K) of the keys among the P + S tokens, in the order of their positions; samples with fewer keys are
            filled up with token 0, which no query may see.
        part: of the keys among tokens laid out, if they are.
        tokens: (B, K, d) input tokens.
        counts: (B, T) how many keys, from the first on, each query may see.
        blocks: the queries in blocks, with the number of keys each block needs.
    """

    index: Tensor
    part: slice | None
    tokens: Tensor
    counts: Tensor
    blocks: list[QueryBlock]

    @property
    def legal(self) -> Tensor:
        """(B, T, K) bool: the query may see the key."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.counts[..., None]


@dataclass(frozen=True)
class KeyAngles:
    """RoPE angles of the queries as they are laid out, of the keys by learner, and of all tokens as they stand."""

    queries: Angles
    keys: dict[str, Angles]
    tokens: Angles

    def last(self, count: int) -> Angles:
        """Of the last `count` tokens."""
        return Angles(*(table[:, :, -count:] for table in self.tokens))


@dataclass(eq=False)
class PrefillEngine(Engine):
    """What all layers of a forward share: how the queries are laid out, and the keys of every learner.

    Attributes:
        layout: of the tokens; None: new tokens are queries as they stand, keys are gathered from all.
        keys: by learner; a learner without keys in this batch is left out.
        active: (B, S, learners with keys) bool: the query sees a key.
    """

    layout: KeyLayout | None
    keys: dict[str, LearnerKeys]
    active: Tensor
    _angles: dict[str, KeyAngles] = field(default_factory=dict)
    _is_perceptual: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def plan(cls, ctx: ForwardContext, config: WingsConfig) -> PrefillEngine:
        """Find the keys of all learners, and how many of them each query may see.

        A key is legal for a query when it stands at or before it (by true position, in the same sample) and neither is
        padding. Under the exact gate the textual learner is inactive at tokens that have seen nothing perceptual.
        """
        # behind a cache a query's own keys are not the first it sees
        layout = lay_out(ctx.all_tokens, config) if ctx.past_tokens is None else None
        inputs = prepared(ctx.all_inputs(), config)
        arranged = inputs if layout is None else layout.arrange(inputs)
        found = {name: _find_keys(name, ctx, config, layout, arranged) for name in config.learners}
        keys = {name: each for name, each in found.items() if each is not None}
        sees = [each.counts > 0 for each in keys.values()]
        active = torch.stack(sees, dim=-1) if sees else inputs.new_zeros(*ctx.tokens.shape, 0, dtype=torch.bool)
        if layout is not None:
            active = layout.restore(active) & ctx.tokens.valid[..., None]  # padding may have no place of its own
        return cls(layout, keys, active)

    # -- attention ------------------------------------------------------------------------------------------------

    def attend(self, learners: LayerLearners, ctx: ForwardContext, query: Tensor) -> Tensor | None:
        if not self.keys:
            return None
        weights = self._router_weights(learners, ctx)
        queries = self._arrange(query)
        angles = self._angles_for(learners, ctx)
        known = self._keys_and_factors(learners, ctx, angles)
        attended: list[Tensor] = []
        ups: list[Tensor] = []
        for name, keys in self.keys.items():
            module = learners.learner(name)
            of_queries = None if angles is None else angles.queries
            attended.append(module.attend(queries, keys.tokens, *known[name], keys.counts, keys.blocks, of_queries))
            ups.append(module.o.up)
        self._publish(learners, ctx, queries, {name: keys for name, (keys, _) in known.items()}, weights)
        # outputs are weighed while they are narrow, and projected up for all learners at once
        low = self._restore(torch.stack(attended, dim=-2))  # (B, S, L, r)
        if weights is not None:
            low = low * weights[..., None].to(low.dtype)
        low = low.masked_fill(~self.active[..., None], 0.0)
        output = F.linear(low.flatten(-2), torch.cat(ups, dim=1).to(low.dtype))
        if learners.must_take_part:  # e.g. the visual one, where the paper's gate keeps the textual one active
            for name in set(learners.config.learners) - self.keys.keys():
                output = output + zero_of(learners.learner(name)).to(output.dtype)
        return output

    def _router_weights(self, learners: LayerLearners, ctx: ForwardContext) -> Tensor | None:
        """(B, S, learners with keys) or (learners with keys,); None for a single learner."""
        if learners.router is None:
            return None
        weights = learners.router_weights(ctx)
        if len(self.keys) < len(learners.config.learners):
            weights = weights[..., [learners.config.learners.index(name) for name in self.keys]]
        return weights

    def _arrange(self, x: Tensor) -> Tensor:
        """(B, S, ..) of the new tokens -> (B, T, ..) as they are laid out."""
        return x if self.layout is None else self.layout.arrange(x)

    def _restore(self, x: Tensor) -> Tensor:
        """(B, T, ..) as they are laid out -> (B, S, ..) of the new tokens."""
        return x if self.layout is None else self.layout.restore(x)

    def _pick(self, learner: str, table: Tensor) -> Tensor:
        """(B, P + S, ..) of all tokens -> (B, K, ..) of a learner's keys."""
        keys = self.keys[learner]
        if self.layout is not None:
            return self.layout.arrange(table)[:, keys.part]
        return pick_tokens(table, keys.index)

    def _angles_for(self, learners: LayerLearners, ctx: ForwardContext) -> KeyAngles | None:
        """RoPE angles of queries and keys; None without RoPE."""
        if not learners.config.rope:
            return None
        layer_type = learners.layer_type
        if layer_type not in self._angles:
            tables = ctx.all_rope(layer_type)
            if tables is None:
                return None
            dtype = next(iter(self.keys.values())).tokens.dtype
            cos, sin = narrow_angles(tables, learners.host_head_dim, learners.head_dim)
            new = ctx.tokens.shape[1]
            self._angles[layer_type] = KeyAngles(
                queries=Angles.of(self._arrange(cos[:, -new:]), self._arrange(sin[:, -new:]), dtype),
                keys={name: Angles.of(self._pick(name, cos), self._pick(name, sin), dtype) for name in self.keys},
                tokens=Angles.of(cos, sin, dtype),
            )
        return self._angles[layer_type]

    # -- keys and value factors: made of their tokens, kept in the cache, found there again ------------------------

    def _keys_and_factors(
        self, learners: LayerLearners, ctx: ForwardContext, angles: KeyAngles | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, H, K, D) rotated keys and (B, K, r) value factors of every learner.

        Without gradients they, or what they are made of, are kept where there is a cache.
        """
        if self.layout is None and not torch.is_grad_enabled():
            return self._continued(learners, ctx, angles)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        keys: dict[str, Tensor] = {}
        for name, each in self.keys.items():
            module = learners.learner(name)
            key_factors, value_factors = module.factors(each.tokens).chunk(2, dim=-1)
            factors[name] = key_factors, value_factors
            keys[name] = module.expand_keys(each.tokens, key_factors, None if angles is None else angles.keys[name])
        if ctx.is_caching and not torch.is_grad_enabled():
            whole = learners.config.cache == "keys"
            kept = {name: keys[name].transpose(1, 2) if whole else factors[name][0][:, :, None] for name in keys}
            values = {name: factors[name][1][:, :, None] for name in keys}
            ctx.to_cache(learners.graft_name, learners.index, self._as_tokens(kept), self._as_tokens(values))
        return {name: (keys[name], factors[name][1]) for name in keys}

    def _continued(
        self, learners: LayerLearners, ctx: ForwardContext, angles: KeyAngles | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Behind a cache: new tokens are added to what it holds, and each learner takes its own out of all."""
        owner = learners.graft_name, learners.index
        modules = {name: learners.learner(name) for name in learners.config.learners}
        # tokens the graft kept nothing of, e.g. because it was inactive, are made anew
        assert ctx.inputs is not None, "the first decoder layer has not been entered"
        tokens = prepared(ctx.inputs if ctx.is_cached(*owner) else ctx.all_inputs(), learners.config)
        made = self._by_owner(ctx, [module.factors(tokens) for module in modules.values()])
        key_factors, value_factors = made.chunk(2, dim=-1)
        known = {}
        if learners.config.cache == "factors":
            of_keys, of_values = ctx.to_cache(*owner, key_factors[:, None], value_factors[:, None])
            for name, each in self.keys.items():
                own_angles = None if angles is None else angles.keys[name]
                keys = modules[name].expand_keys(each.tokens, self._pick(name, of_keys[:, 0]), own_angles)
                known[name] = keys, self._pick(name, of_values[:, 0])
            return known
        expanded = tokens + self._by_owner(ctx, [module.k.apply_up(key_factors) for module in modules.values()])
        new = next(iter(modules.values())).heads(expanded)
        if angles is not None:
            new = rotate(new, angles.last(tokens.shape[1]))
        of_keys, of_values = ctx.to_cache(*owner, new, value_factors[:, None])
        for name in self.keys:
            keys = self._pick(name, of_keys.transpose(1, 2)).transpose(1, 2)
            known[name] = keys, self._pick(name, of_values[:, 0])
        return known

    def _as_tokens(self, tables: Mapping[str, Tensor]) -> Tensor:
        """(B, K, h, C) of every learner's keys -> (B, h, S, C) of the tokens; 0 at tokens that are nobody's key."""
        assert self.layout is not None
        some = next(iter(tables.values()))
        parts = [
            tables[name] if name in tables else some.new_zeros(some.shape[0], size, *some.shape[2:])
            for name, size in zip(PARTS, self.layout.sizes, strict=True)
        ]
        return self.layout.restore(torch.cat(parts, dim=1)).transpose(1, 2)

    def _by_owner(self, ctx: ForwardContext, each: Sequence[Tensor]) -> Tensor:
        """(B, tokens, C) of the last tokens, each from the learner whose key it is."""
        if len(each) == 1:
            return each[0]
        visual, textual = each
        count = visual.shape[1]
        if count not in self._is_perceptual:  # the same in all layers
            self._is_perceptual[count] = ctx.all_tokens.last(count).is_perceptual[..., None]
        return torch.where(self._is_perceptual[count], visual, textual)

    # -- the learners' attention, for probes (seam.Branch) ----------------------------------------------------------

    @torch.no_grad()
    def _publish(
        self,
        learners: LayerLearners,
        ctx: ForwardContext,
        queries: Tensor,
        keys: Mapping[str, Tensor],
        weights: Tensor | None,
    ) -> None:
        """Publish the learners' attention as branches of this layer, where somebody wants to know.

        Args:
            queries: (B, T, d) as they are laid out.
            keys: (B, H, K, D) by learner, rotated.
            weights: the router's, broadcastable to (B, S, learners with keys); None for a single learner (1).
        """
        if not ctx.subscribers(learners.index):
            return
        for index, name in enumerate(self.keys):
            weight = queries.new_ones(()) if weights is None else weights[..., index : index + 1]
            sums = partial(self._sums, learners, ctx, name, queries, keys[name])
            branch = Branch(learners.graft_name, name, weight * learners.config.gain, sums)
            ctx.publish(learners.index, branch)

    @torch.no_grad()
    def _sums(
        self, learners: LayerLearners, ctx: ForwardContext, name: str, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """(B, S, H, C) sums of a learner's attention over (B, P + S, C) values; 0 at tokens where it is inactive.

        The learner's own queries and keys attend to the given values in the place of its own, without dropout.
        """
        module = learners.learner(name)
        angles = self._angles_for(learners, ctx)
        q = module.queries(queries, None if angles is None else angles.queries)
        legal = self.keys[name].legal
        active = legal.any(dim=-1, keepdim=True)
        sums = [
            F.scaled_dot_product_attention(
                q,
                keys.to(q.dtype),
                F.pad(part, (0, module.head_dim - part.shape[-1]))[:, None].expand(-1, q.shape[1], -1, -1),
                attn_mask=(legal | ~active)[:, None],
                scale=module.head_dim**-0.5,
            )[..., : part.shape[-1]]
            for part in self._pick(name, values.to(q)).split(module.head_dim, dim=-1)
        ]
        return self._restore(torch.cat(sums, dim=-1).transpose(1, 2) * active[..., None])


def _find_keys(
    learner: str, ctx: ForwardContext, config: WingsConfig, layout: KeyLayout | None, inputs: Tensor
) -> LearnerKeys | None:
    """The keys of a learner; None without any.

    Args:
        inputs: (B, P + S, d) prepared input tokens, laid out where there is a layout.
    """
    every, new = ctx.all_tokens, ctx.tokens
    if layout is None:
        part, (index, real) = None, first_tokens(keys_of(learner, every, config))
    else:
        part = layout.part(learner)
        index, real = layout.index[:, part], layout.real[:, part]
    if not index.shape[1]:
        return None
    position = torch.where(real, every.position.gather(1, index), torch.iinfo(torch.int64).max)
    counts = torch.searchsorted(position, new.position.contiguous(), right=True)  # 0 at padding, whose position is -1
    if learner == "textual" and config.gate == "exact":
        counts = counts * every.has_seen[:, -new.shape[1] :]
    if layout is None or part is None:
        return LearnerKeys(index, None, pick_tokens(inputs, index), counts, split_queries(counts))
    counts = layout.arrange(counts)
    return LearnerKeys(index, part, inputs[:, part], counts, split_queries(counts, cuts=layout.cuts, own=part))


# -- the order of the tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyLayout:
    """The tokens of a batch with the keys of the textual learner first, then those of the visual one, then others.

    Attributes:
        index: (B, T) the token at each place. Where tokens are moved one by one, samples with fewer tokens in a part
            than others are filled up with token 0, and padding has no place; in segments it stays behind the text.
        real: (B, T) whether the place holds a token of the prompt: neither padding nor there to fill up.
        sizes: how many places each of the three parts has.
        cuts: places in front of which a segment of tokens ends that were neighbors in the prompt.
        segments: the lengths of all segments, and which of them comes when, where that is the same in all samples.
            None: tokens are moved one by one, by `index` and `back`.
        back: (B, S) the place of each token; only without segments. Padding has place 0.
    """

    index: Tensor
    real: Tensor
    sizes: tuple[int, int, int]
    cuts: tuple[int, ...]
    segments: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    back: Tensor | None = None

    def part(self, learner: str) -> slice:
        """The places of a learner's keys."""
        index = PARTS.index(learner)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def arrange(self, x: Tensor) -> Tensor:
        """(B, S, ..) -> (B, T, ..)."""
        if self.segments is None:
            return pick_tokens(x, self.index)
        lengths, sequence = self.segments
        return _permuted(x, lengths, sequence)

    def restore(self, x: Tensor) -> Tensor:
        """(B, T, ..) -> (B, S, ..)."""
        if self.back is not None:
            return pick_tokens(x, self.back)
        assert self.segments is not None
        lengths, sequence = self.segments
        inverse = sorted(range(len(sequence)), key=sequence.__getitem__)
        return _permuted(x, [lengths[segment] for segment in sequence], inverse)


def lay_out(tokens: TokenMap, config: WingsConfig) -> KeyLayout:
    """The layout of all tokens of a prompt. Synchronizes with the device three times."""
    part = torch.where(tokens.is_perceptual, 1, 0)
    if "textual" in config.learners:
        part = torch.where(tokens.is_text & ~keys_of("textual", tokens, config), 2, part)
    column = torch.arange(tokens.shape[1], device=tokens.device)
    # behind the last token padding is a key of nobody, and need not be told from text
    alike = (part == part[:1]).all() & ((tokens.position == column) | ~tokens.valid).all()
    lengths = segment_lengths(part[0])
    if len(lengths) <= MOST_SEGMENTS and bool(alike):
        return _by_segments(part[0], lengths, tokens.valid)
    return _by_index(part, tokens.valid)


def _by_segments(part: Tensor, lengths: Sequence[int], valid: Tensor) -> KeyLayout:
    starts = list(itertools.accumulate(lengths, initial=0))
    owner = part[torch.tensor(starts[:-1], device=part.device)].tolist()
    sequence = tuple(sorted(range(len(lengths)), key=owner.__getitem__))
    ordered = [lengths[segment] for segment in sequence]
    index = torch.cat([torch.arange(starts[segment], starts[segment + 1], device=part.device) for segment in sequence])
    sizes = [sum(n for n, o in zip(lengths, owner, strict=True) if o == i) for i in range(3)]
    return KeyLayout(
        index.expand(len(valid), -1),
        valid[:, index],
        (sizes[0], sizes[1], sizes[2]),
        tuple(itertools.accumulate(ordered[:-1])),
        (tuple(lengths), sequence),
    )


def _by_index(part: Tensor, valid: Tensor) -> KeyLayout:
    chosen = [(part == i) & valid for i in range(3)]
    counts = torch.stack([each.sum(dim=1).max() for each in chosen]).tolist()
    picked = [first_tokens(each, most) for each, most in zip(chosen, counts, strict=True)]
    index = torch.cat([index for index, _ in picked], dim=1)
    real = torch.cat([real for _, real in picked], dim=1)
    batch, length = part.shape
    back = index.new_zeros(batch, length + 1)
    places = torch.arange(index.shape[1], device=index.device).expand(batch, -1)
    back.scatter_(1, torch.where(real, index, length), places)  # what fills up lands behind the last token
    sizes = (counts[0], counts[1], counts[2])
    cuts = tuple(cut for cut in itertools.accumulate(counts[:2]) if 0 < cut < index.shape[1])
    return KeyLayout(index, real, sizes, cuts, back=back[:, :-1])


def _permuted(x: Tensor, lengths: Sequence[int], sequence: Sequence[int]) -> Tensor:
    if list(sequence) == sorted(sequence):
        return x
    segments = x.split(list(lengths), dim=1)
    return torch.cat([segments[i] for i in sequence], dim=1)
