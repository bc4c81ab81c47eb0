"""Learners for many queries, one learner at a time through a fused kernel: what a prompt or a training batch computes.

Keys and values of both learners are the decoder's input tokens (perceptual tokens for the visual learner, text tokens
for the textual one), shared by all layers. Which key a query may see is decided by true position, modality and
validity. In the order of their positions, the keys a query may see are always the first n: one number per query says
it all.

Tokens come as they stand in the prompt, text and images in turns. Put side by side (`KeyLayout`), the tokens that are
keys of one learner attend to one another as in any causal decoder, each to those before it. That needs no mask, which
lets the fastest kernels in, and no keys are gathered per learner.

What a cache keeps of a token is in two forms (`WingsConfig.cache`): the factors of its key and value, or its rotated
key and the factors of its value or, where ranks are low, what `o.down` makes of it (`learners.keeps_outputs`).

Shapes: B batch, S new tokens, P cached tokens, T queries in the order they are laid out (S, or more where samples are
filled up), K key tokens of one learner, d stream width, H heads, D their width, r rank.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.learners import (
    MOST_SEGMENTS,
    Angles,
    Engine,
    LayerLearners,
    LoRRA,
    QueryBlock,
    active_of,
    attend_blocks,
    by_owner,
    check_roles,
    first_tokens,
    keys_of,
    narrow_angles,
    pick_tokens,
    prepared,
    project,
    rotate,
    segment_lengths,
    split_queries,
    zero_of,
)
from alula.grafts.wings.stacked import LayerWeights, Weights, along, compute_dtype
from alula.seam import Branch, ForwardContext, Uncompiled
from alula.tokens import KnownTokens, Role, TokenMap

PARTS = ("textual", "visual", "others")


class Cut(NamedTuple):
    """How what blocks of queries give becomes what segments of tokens are given: each block is split into `sizes`, and
    of all pieces the ones at `order` follow each other in the prompt."""

    sizes: list[list[int]]
    order: list[int]


@dataclass(frozen=True)
class LearnerKeys:
    """The keys of one learner, out of all tokens of the batch.

    Attributes:
        index: (B, K) of the keys among the P + S tokens, in the order of their positions; samples with fewer keys are
            filled up with token 0, which no query may see. None where whole segments are keys.
        part: of the keys among tokens laid out, if they are.
        tokens: (B, K, d) input tokens.
        counts: (B, T) how many keys, from the first on, each query may see.
        blocks: the queries in blocks, with the number of keys each block needs.
        cut: how what blocks give comes back into the order of the prompt, where whole segments were moved.
    """

    index: Tensor | None
    part: slice | None
    tokens: Tensor
    counts: Tensor
    blocks: list[QueryBlock]
    cut: Cut | None = None

    def mask(self, queries: slice) -> Tensor | None:
        """(B, 1, queries, K) bool for some that lie side by side; None where there are none of them. A query without
        keys sees the first: its output is zeroed, but must not be NaN."""
        if queries.start == queries.stop:
            return None
        key = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return key < self.counts[:, None, queries, None].clamp(min=1)

    @property
    def legal(self) -> Tensor:
        """(B, T, K) bool: the query may see the key."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.counts[..., None]


@dataclass(frozen=True)
class KeyAngles:
    """RoPE angles of the queries as they are laid out, of the keys by learner, and of all tokens as they stand."""

    queries: Angles
    keys: dict[str, Angles]
    tokens: Angles


@dataclass(frozen=True)
class Made:
    """What the layers of one graft share in a forward in which nothing is trained, by layer.

    Attributes:
        weights: of their learners.
        factors: by learner (2, B * K, r) of its keys and of its values.
        keys: by learner (B, H, K, D) rotated keys, where a cache holds these; else they are made layer by layer.
        all_factors, all_keys: of all layers, (B * K, layers, 2, r) and (layers, B, H, K, D).
    """

    weights: list[LayerWeights]
    factors: dict[str, Sequence[Tensor]]
    keys: dict[str, Sequence[Tensor]] | None
    all_factors: Mapping[str, Tensor]
    all_keys: Mapping[str, Tensor] | None


class PromptKeys(NamedTuple):
    """The keys of one learner in a compiled layer.

    Attributes:
        tokens: (B, K, d) input tokens.
        before: (B, 1, queries, K) bool which keys the queries in front of those of its own may see; behind: likewise.
            None: there are no such queries.
        has_own: the tokens are queries as well, which see one another causally.
    """

    tokens: Tensor
    before: Tensor | None
    behind: Tensor | None
    has_own: bool


@dataclass(frozen=True, eq=False)
class PromptPart:
    """What the learners add in a compiled layer.

    Attributes:
        by: the learners.
        dtype: in which products are computed.
        first: the first of the learners that have keys.
        place: (1,) of the layer among those that `factors` and `rotated` are of.
        factors, rotated: by learner with keys, what was made for all layers at once, as in `Made`; None while they are
            trained, of `rotated` also where keys are made of their factors.
        keys: by learner with keys.
        index: (B, T) the token at each place; back: (B, S) the place of each token.
        inactive: (B, S, learners with keys) bool.
        angles, key_angles: of the queries as they are laid out, and of each learner's keys.
    """

    by: LayerLearners
    dtype: torch.dtype
    first: int
    place: Tensor
    factors: tuple[Tensor, ...] | None
    rotated: tuple[Tensor, ...] | None
    keys: tuple[PromptKeys, ...]
    index: Tensor
    back: Tensor
    inactive: Tensor
    angles: Angles | None
    key_angles: tuple[Angles, ...] | None

    @property
    def is_few(self) -> bool:
        return False

    @property
    def wants_sums(self) -> bool:
        return self.by.wants_sums

    def add(self, stream: Tensor, branch: Tensor, sums: Tensor | None) -> Tensor:
        query = pick_tokens(self.by.query(stream, branch), self.index)
        # put together here, where it is fused with what comes behind: slices of what is kept differ by their place
        weights = Weights.of([self.by.learners()], self.dtype).layers[0]
        weights = weights.only(slice(self.first, self.first + len(self.keys)))
        learner = self.by.learners()[0]
        q = learner.heads(weights.queries(query).view(-1, *query.shape))
        q = q if self.angles is None else rotate(q, self.angles)
        attended = []
        for place, of in enumerate(self.keys):
            if self.factors is None:
                down, rank = weights.kv_down[place], weights.q_up.shape[1]
                low = F.linear(of.tokens, down).view(-1, 2, rank).transpose(0, 1)
            else:
                low = self.factors[place].index_select(1, self.place).squeeze(1).transpose(0, 1)
            keys, values = keys_and_values(
                learner,
                of.tokens,
                low,
                weights.kv_up[place],
                None if self.rotated is None else self.rotated[place].index_select(0, self.place).squeeze(0),
                None if self.key_angles is None else self.key_angles[place],
            )
            attended.append(_attended(q[place], keys, values, of))
        joined = torch.stack(attended, dim=1).transpose(2, 3).flatten(3)  # (B, L, T, d)
        low = pick_tokens(torch.matmul(joined, weights.o_down).transpose(1, 2), self.back)  # (B, S, L, r)
        if self.by.router is not None:
            routed = self.by.router(sums)
            routed = routed[..., self.first : self.first + len(self.keys)]
            low = low * routed[..., None].to(low.dtype)
        low = low.masked_fill(self.inactive[..., None], 0.0)
        return project(low.flatten(-2), weights.o_up, branch, self.by.config.gain)


def _attended(q: Tensor, keys: Tensor, values: Tensor, of: PromptKeys) -> Tensor:
    """(B, H, T, D) of one learner's queries as they are laid out, of lengths that are sizes of tensors."""
    scale = q.shape[-1] ** -0.5
    start = 0 if of.before is None else of.before.shape[-2]
    stop = start + of.tokens.shape[1] if of.has_own else start
    parts = []
    if of.before is not None:
        parts.append(F.scaled_dot_product_attention(q[:, :, :start], keys, values, attn_mask=of.before, scale=scale))
    if of.has_own:
        parts.append(F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, is_causal=True, scale=scale))
    if of.behind is not None:
        parts.append(F.scaled_dot_product_attention(q[:, :, stop:], keys, values, attn_mask=of.behind, scale=scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def keys_and_values(
    learner: LoRRA, tokens: Tensor, low: Tensor, ups: Tensor, rotated: Tensor | None, angles: Angles | None
) -> tuple[Tensor, Tensor]:
    """(B, H, K, D) rotated keys and values of one learner.

    Args:
        tokens: (B, K, d); low: (2, B * K, r) factors of keys and of values; ups: (2, r, d).
        rotated: the keys, where they are made already.
        angles: of the keys; None without RoPE.
    """
    flat = tokens.reshape(1, -1, tokens.shape[-1])
    if rotated is not None:
        return rotated, learner.heads(torch.addmm(flat[0], low[1], ups[1]).view(tokens.shape))
    pair = torch.baddbmm(flat.expand(2, -1, -1), low, ups)
    k, v = (learner.heads(part.view(tokens.shape)) for part in pair.unbind(0))
    return k if angles is None else rotate(k, angles), v


@dataclass(eq=False)
class PrefillEngine(Engine):
    """What all layers of a forward share: how the queries are laid out, and the keys of every learner.

    Attributes:
        layout: of the tokens; None: new tokens are queries as they stand, keys are gathered from all.
        keys: by learner; a learner without keys in this batch is left out.
        inactive: (B, S, learners with keys) bool: the query sees no key.
        chosen: which of the learners have keys.
    """

    layout: KeyLayout | None
    keys: dict[str, LearnerKeys]
    inactive: Tensor
    chosen: slice
    _angles: dict[str, KeyAngles] = field(default_factory=dict)
    _made: dict[str, Made | None] = field(default_factory=dict)

    @classmethod
    def plan(cls, ctx: ForwardContext, config: WingsConfig) -> PrefillEngine:
        """Find the keys of all learners, and how many of them each query may see.

        A key is legal for a query when it stands at or before it (by true position, in the same sample) and neither is
        padding. Under the exact gate the textual learner is inactive at tokens that have seen nothing perceptual.
        """
        known = ctx.known(exactly=True)
        roles = None if config.system_keys or "textual" not in config.learners else ctx.all_tokens.role.cpu().numpy()
        parts = parts_of(known, roles)
        # behind a cache a query's own keys are not the first it sees
        layout = lay_out(ctx.all_tokens, known, config, parts) if ctx.past_tokens is None else None
        inputs = prepared(ctx.all_inputs(), config)
        arranged = inputs if layout is None else layout.arrange(inputs)
        keys, inactive = {}, []
        for learner in config.learners:
            is_key = parts == PARTS.index(learner)
            if is_key.any():
                chosen = keys_of(learner, ctx.all_tokens, config)
                active = active_of(learner, ctx.all_tokens, config, chosen)
                keys[learner] = _keys(learner, ctx, config, layout, arranged, chosen, active, is_key)
                inactive.append(~active[:, -ctx.tokens.shape[1] :])
        first = config.learners.index(next(iter(keys))) if keys else 0
        return cls(
            layout,
            keys,
            torch.stack(inactive, dim=-1) if keys else ctx.tokens.valid[..., None][..., :0],
            slice(first, first + len(keys)),
        )

    # -- attention ------------------------------------------------------------------------------------------------

    def attend(
        self, learners: LayerLearners, ctx: ForwardContext, query: Tensor, branch: Tensor | None = None
    ) -> Tensor | None:
        if not self.keys:
            return None
        module = learners.learners()[0]
        weights, keys, values = self._keys_and_values(learners, ctx)
        angles = self._angles_for(learners, ctx)
        queries = self._arrange(query)
        q = self._queries(module, weights, queries, angles)
        dropout = module.dropout if module.training else 0.0
        parts = [
            attend_blocks(mine, keys[name], values[name], of.counts, of.blocks, dropout)
            for mine, (name, of) in zip(along(q), self.keys.items(), strict=True)
        ]
        self._publish(learners, ctx, q, keys)
        # outputs are weighed while they are narrow, and projected up for all learners at once
        low = torch.matmul(self._together(parts), weights.o_down).transpose(1, 2)  # (B, T, L, r)
        if self.layout is not None and self.layout.segments is None:
            low = self.layout.restore(low)
        routed = self._router_weights(learners, ctx)
        if routed is not None:
            low = low * routed[..., None].to(low.dtype)
        low = low.masked_fill(self.inactive[..., None], 0.0)
        output = project(low.flatten(-2), weights.o_up, branch, learners.config.gain)
        if learners.must_take_part:  # e.g. the visual one, where the paper's gate keeps the textual one active
            for name in set(learners.config.learners) - self.keys.keys():
                output = output + zero_of(learners.learner(name)).to(output.dtype)
        return output

    def part(self, learners: LayerLearners, ctx: ForwardContext) -> PromptPart | None:
        if not self.keys:
            return None
        if learners.training and learners.config.dropout:
            raise Uncompiled("learners drop attention weights out")
        siblings, made, place = learners.siblings, self._made.get(learners.graft_name), 0
        if made is not None:
            place = learners.place
        elif not torch.is_grad_enabled():
            some = next(iter(self.keys.values())).tokens
            made = self._make([learners], siblings.of_layer(learners, some), ctx)
        angles, (index, back, keys) = self._angles_for(learners, ctx), self._compiled
        return PromptPart(
            learners,
            compute_dtype(next(iter(self.keys.values())).tokens),
            self.chosen.start,
            siblings.place_on(self.inactive.device, place),
            None if made is None else tuple(made.all_factors.values()),
            None if made is None or made.all_keys is None else tuple(made.all_keys.values()),
            keys,
            index,
            back,
            self.inactive,
            None if angles is None else angles.queries,
            None if angles is None else tuple(angles.keys.values()),
        )

    @cached_property
    def _compiled(self) -> tuple[Tensor, Tensor, tuple[PromptKeys, ...]]:
        """(B, T) the token at each place, (B, S) the place of each token, and each learner's keys in the form in which
        lengths are the sizes of tensors alone."""
        device, batch = self.inactive.device, len(self.inactive)
        index = torch.arange(self.inactive.shape[1], device=device).expand(batch, -1)
        back = index
        if self.layout is not None and self.layout.index is not None and self.layout.back is not None:
            index, back = self.layout.index, self.layout.back
        elif self.layout is not None:
            index, back = self.layout.arrange(index), self.layout.restore(index)
        keys = []
        for of in self.keys.values():
            whole, own = of.counts.shape[1], of.part
            before = slice(0, whole if own is None else own.start)
            behind = None if own is None else slice(own.stop, whole)
            keys.append(
                PromptKeys(of.tokens, of.mask(before), None if behind is None else of.mask(behind), own is not None)
            )
        return index.contiguous(), back.contiguous(), tuple(keys)

    def _queries(self, module: LoRRA, weights: LayerWeights, x: Tensor, angles: KeyAngles | None) -> Tensor:
        """(L, B, H, T, D) of (B, T, d), projected and rotated for every learner."""
        q = module.heads(weights.queries(x).view(-1, *x.shape))
        return q if angles is None else rotate(q, angles.queries)

    def _together(self, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """(B, L, T, d) of every learner's (B, H, block, D), in the order of the tokens where they lie in segments."""
        batch = len(parts[0][0])
        pieces: list[Tensor] = []
        for of_learner, keys in zip(parts, self.keys.values(), strict=True):
            if keys.cut is None:
                pieces += of_learner
                continue
            cut = [
                piece
                for part, sizes in zip(of_learner, keys.cut.sizes, strict=True)
                for piece in (part.split(sizes, dim=2) if len(sizes) > 1 else [part])
            ]
            pieces += [cut[place] for place in keys.cut.order]
        heads = [piece.transpose(1, 2) for piece in pieces]
        whole = heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)
        return whole.reshape(batch, len(parts), -1, whole.shape[-1] * whole.shape[-2])

    def _router_weights(self, learners: LayerLearners, ctx: ForwardContext) -> Tensor | None:
        """(B, S, learners with keys) or (learners with keys,); None for a single learner."""
        weights = learners.router_weights(ctx)
        return weights if weights is None or len(self.keys) == weights.shape[-1] else weights[..., self.chosen]

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
        assert keys.index is not None
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

    # -- keys and values: made of their tokens; what they are made of is kept in the cache, and found there again ---

    def prepare(self, learners: LayerLearners, ctx: ForwardContext) -> None:
        """Make factors for all layers at once, and have the cache keep them, where nothing is trained."""
        super().prepare(learners, ctx)
        name = learners.graft_name
        if torch.is_grad_enabled():
            learners.siblings.forget()  # what is trained is changed
            return
        if not self.keys or name in self._made:
            return
        some = next(iter(self.keys.values())).tokens
        siblings = learners.siblings
        weights = siblings.weights(some, fresh=True)
        is_shared = weights is not None and (siblings.share_keys or not ctx.is_caching)
        self._made[name] = self._make(siblings.layers, weights, ctx) if weights and is_shared else None

    def _keys_and_values(
        self, learners: LayerLearners, ctx: ForwardContext
    ) -> tuple[LayerWeights, dict[str, Tensor], dict[str, Tensor]]:
        """The learners' matrices, and by learner (B, H, K, D) rotated keys and values."""
        made, place = self._made.get(learners.graft_name), 0
        if made is None:
            some = next(iter(self.keys.values())).tokens
            alone = learners.siblings.of_layer(learners, some)
            if torch.is_grad_enabled():
                made = self._made_of(alone, self._factors(alone, learners.config), None)
            else:
                made = self._make([learners], alone, ctx)
        else:
            place = learners.place
        weights, angles = made.weights[place], self._angles_for(learners, ctx)
        keys, values = {}, {}
        for ups, (name, of) in zip(along(weights.kv_up), self.keys.items(), strict=True):
            keys[name], values[name] = keys_and_values(
                learners.learner(name),
                of.tokens,
                made.factors[name][place],
                ups,
                None if made.keys is None else made.keys[name][place],
                None if angles is None else angles.keys[name],
            )
        return weights, keys, values

    def _factors(self, weights: Weights, config: WingsConfig) -> dict[str, Tensor]:
        """By learner (B * K, layers, 2, r) of its keys and of its values."""
        downs = dict(zip(config.learners, along(weights.kv_down), strict=True))
        low = {name: F.linear(of.tokens, downs[name]) for name, of in self.keys.items()}
        return {name: of.view(-1, len(weights.layers), 2, config.rank) for name, of in low.items()}

    def _make(self, layers: Sequence[LayerLearners], weights: Weights, ctx: ForwardContext) -> Made:
        """Factors of some layers' keys and values, stored in the cache where there is one."""
        if self.layout is None:
            return self._continued(layers, weights, ctx)
        factors = self._factors(weights, layers[0].config)
        keys = None
        if ctx.is_caching:
            batch = len(next(iter(self.keys.values())).tokens)
            by_token = {name: low.unflatten(0, (batch, -1)) for name, low in factors.items()}  # (B, K, layers, 2, r)
            kept = {name: low[..., 0, :] for name, low in by_token.items()}
            of_values = {name: low[..., 1, :] for name, low in by_token.items()}
            if layers[0].config.cache == "keys":
                angles = self._angles_for(layers[0], ctx)  # these layers share keys
                keys = {}
                for index, (name, of) in enumerate(self.keys.items()):
                    ups = weights.k_up[:, self.chosen.start + index]
                    turned = None if angles is None else angles.keys[name]
                    keys[name] = self._keys_of(layers[0], of.tokens, factors[name][:, :, 0], ups, turned)
                    kept[name] = keys[name].permute(1, 3, 0, 2, 4).flatten(2, 3)
                    if layers[0].keeps_outputs:
                        made = weights.outputs(layers[0].head_dim).made(
                            self.chosen.start + index, of.tokens, of_values[name]
                        )
                        of_values[name] = made.transpose(1, 2)
            indices = [layer.index for layer in layers]
            ctx.to_cache(layers[0].graft_name, indices, self._as_tokens(kept), self._as_tokens(of_values))
        return self._made_of(weights, factors, keys)

    def _continued(self, layers: Sequence[LayerLearners], weights: Weights, ctx: ForwardContext) -> Made:
        """Behind a cache: new tokens are added to what it holds, and each learner takes its own out of all."""
        config, count, rank = layers[0].config, len(layers), layers[0].config.rank
        name, indices = layers[0].graft_name, [layer.index for layer in layers]
        # tokens the graft kept nothing of, e.g. because it was inactive, are made anew
        assert ctx.inputs is not None, "the first decoder layer has not been entered"
        tokens = prepared(ctx.inputs if ctx.is_cached(name, indices[0]) else ctx.all_inputs(), config)
        batch, new = tokens.shape[:2]
        owners = ctx.all_tokens.last(new).is_perceptual[..., None]
        low = by_owner(owners, [F.linear(tokens, down) for down in weights.kv_down])
        low = low.view(batch, new, count, 2, rank)
        kept, values = low[..., 0, :].transpose(1, 2), low[..., 1, :].transpose(1, 2)
        if config.cache == "keys":
            angles = self._angles_for(layers[0], ctx)
            turned = None if angles is None else Angles(*(table[:, :, -new:] for table in angles.tokens))
            flat = low[..., 0, :].reshape(batch * new, count, rank)
            of_each = [self._keys_of(layers[0], tokens, flat, ups, turned) for ups in weights.k_up.unbind(1)]
            kept = by_owner(owners[:, None], of_each).transpose(0, 1).flatten(1, 2)
        if layers[0].keeps_outputs:
            by = weights.outputs(layers[0].head_dim)
            makers = range(len(config.learners))
            values = by_owner(owners[:, None], [by.made(maker, tokens, low[..., 1, :]) for maker in makers])
        of_keys, of_values = ctx.to_cache(name, indices, kept, values)
        # many queries attend to values, which are made of their factors
        factors = self._factors(weights, config) if layers[0].keeps_outputs else {}
        keys = {}
        for learner in self.keys:
            picked = self._pick(learner, of_keys.transpose(1, 2))
            if config.cache == "keys":
                keys[learner] = picked.unflatten(2, (count, -1)).permute(2, 0, 3, 1, 4)
            if learner not in factors:
                parts = [self._pick(learner, of_values.transpose(1, 2))]  # (B, K, layers, r)
                parts = [*parts, *parts] if config.cache == "keys" else [picked, *parts]
                factors[learner] = torch.stack(parts, dim=-2).flatten(0, 1)
        return self._made_of(weights, factors, keys or None)

    def _made_of(self, weights: Weights, factors: Mapping[str, Tensor], keys: Mapping[str, Tensor] | None) -> Made:
        return Made(
            [each.only(self.chosen) for each in weights.layers],
            {name: [part.transpose(0, 1) for part in along(low, dim=1)] for name, low in factors.items()},
            None if keys is None else {name: along(of_learner) for name, of_learner in keys.items()},
            factors,
            keys,
        )

    @staticmethod
    def _keys_of(
        learners: LayerLearners, tokens: Tensor, factors: Tensor, ups: Tensor, angles: Angles | None
    ) -> Tensor:
        """(layers, B, H, K, D) rotated keys of one learner.

        Args:
            tokens: (B, K, d); factors: (B * K, layers, r); ups: (layers, r, d).
            angles: of the tokens, the same in these layers.
        """
        every = tokens.reshape(1, -1, tokens.shape[-1]).expand(len(ups), -1, -1)
        keys = torch.baddbmm(every, factors.transpose(0, 1), ups).view(len(ups), *tokens.shape)
        keys = learners.learners()[0].heads(keys)
        return keys if angles is None else rotate(keys, angles)

    def _as_tokens(self, tables: Mapping[str, Tensor]) -> Tensor:
        """(B, K, h, C) of every learner's keys -> (B, h, S, C) of the tokens; 0 at tokens that are nobody's key."""
        assert self.layout is not None
        some = next(iter(tables.values()))
        parts = [
            tables[name] if name in tables else some.new_zeros(some.shape[0], size, *some.shape[2:])
            for name, size in zip(PARTS, self.layout.sizes, strict=True)
            if size
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.layout.restore(whole).transpose(1, 2)

    # -- the learners' attention, for probes (seam.Branch) ----------------------------------------------------------

    @torch.no_grad()
    def _publish(self, learners: LayerLearners, ctx: ForwardContext, q: Tensor, keys: Mapping[str, Tensor]) -> None:
        """Publish the learners' attention as branches of this layer, where somebody wants to know.

        Args:
            q: (L, B, H, T, D) of every learner with keys, as they are laid out.
            keys: (B, H, K, D) by learner, rotated.
        """
        if not ctx.subscribers(learners.index):
            return
        weights = self._router_weights(learners, ctx)
        for index, name in enumerate(self.keys):
            weight = q.new_ones(()) if weights is None else weights[..., index : index + 1]
            sums = partial(self._sums, name, q[index].detach(), keys[name].detach())
            branch = Branch(learners.graft_name, name, weight * learners.config.gain, sums)
            ctx.publish(learners.index, branch)

    @torch.no_grad()
    def _sums(self, name: str, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, S, H, C) sums of a learner's attention over (B, P + S, C) values; 0 at tokens where it is inactive.

        The learner's own queries and keys attend to the given values in the place of its own, without dropout.
        """
        legal, width = self.keys[name].legal, q.shape[-1]
        active = legal.any(dim=-1, keepdim=True)
        sums = [
            F.scaled_dot_product_attention(
                q,
                keys.to(q.dtype),
                F.pad(part, (0, width - part.shape[-1]))[:, None].expand(-1, q.shape[1], -1, -1),
                attn_mask=(legal | ~active)[:, None],
                scale=width**-0.5,
            )[..., : part.shape[-1]]
            for part in self._pick(name, values.to(q)).split(width, dim=-1)
        ]
        return self._restore(torch.cat(sums, dim=-1).transpose(1, 2) * active[..., None])


def _keys(
    learner: str,
    ctx: ForwardContext,
    config: WingsConfig,
    layout: KeyLayout | None,
    inputs: Tensor,
    chosen: Tensor,
    active: Tensor,
    is_key: np.ndarray,
) -> LearnerKeys:
    """The keys of a learner.

    Args:
        inputs: (B, P + S, d) prepared input tokens, laid out where there is a layout.
        chosen: (B, P + S) bool: the token is a key, on the device.
        active: (B, P + S) bool: it attends to any.
        is_key: `chosen` on the host.
    """
    new, known = ctx.tokens.shape[1], ctx.known(exactly=True)
    sees = known.valid
    if learner == "textual" and config.gate == "exact":
        sees = sees & (known.is_perceptual.cumsum(axis=1) > 0)
    seen = (is_key.cumsum(axis=1) * sees)[:, -new:]
    counts = (chosen.cumsum(dim=1) * active)[:, -new:]
    if layout is None:
        index, _ = first_tokens(chosen, int(is_key.sum(axis=1).max()))
        return LearnerKeys(index, None, pick_tokens(inputs, index), counts, split_queries(seen))
    part = layout.part(learner)
    blocks = split_queries(layout.arranged(seen), cuts=layout.cuts, own=part)
    cut = None if layout.segments is None else _cut(blocks, layout)
    return LearnerKeys(None, part, inputs[:, part].contiguous(), layout.arrange(counts), blocks, cut)


def _cut(blocks: Sequence[QueryBlock], layout: KeyLayout) -> Cut:
    places, sizes, segments = [0, *layout.cuts, sum(layout.sizes)], [], []
    for block in blocks:
        inside = [place for place in places if block.start < place < block.stop]
        bounds = [block.start, *inside, block.stop]
        sizes.append([stop - start for start, stop in itertools.pairwise(bounds)])
        segments += [bisect.bisect_right(places, start) - 1 for start in bounds[:-1]]
    sequence = layout.segments[1] if layout.segments else tuple(range(len(places)))
    return Cut(sizes, sorted(range(len(segments)), key=lambda piece: sequence[segments[piece]]))


# -- the order of the tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KeyLayout:
    """The tokens of a batch with the keys of the textual learner first, then those of the visual one, then others.

    Attributes:
        sizes: how many places each of the three parts has.
        cuts: places in front of which a segment of tokens ends that were neighbors in the prompt.
        segments: the lengths of all segments, and which of them comes when, where that is the same in all samples;
            padding stays behind the text. None: tokens are moved one by one, by `index` and `back`.
        index: (B, T) the token at each place; samples with fewer tokens in a part than others are filled up with token
            0, and padding has no place. Only without segments.
        back: (B, S) the place of each token; only without segments. Padding has place 0.
        order: `index` on the host.
    """

    sizes: tuple[int, int, int]
    cuts: tuple[int, ...]
    segments: tuple[tuple[int, ...], tuple[int, ...]] | None
    index: Tensor | None = None
    back: Tensor | None = None
    order: np.ndarray | None = None

    def part(self, learner: str) -> slice:
        """The places of a learner's keys."""
        index = PARTS.index(learner)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def arrange(self, x: Tensor) -> Tensor:
        """(B, S, ..) -> (B, T, ..)."""
        if self.index is not None:
            return pick_tokens(x, self.index)
        assert self.segments is not None
        return _permuted(x, *self.segments)

    def arranged(self, x: np.ndarray) -> np.ndarray:
        """(B, S) -> (B, T) on the host."""
        if self.order is not None:
            return np.take_along_axis(x, self.order, axis=1)
        assert self.segments is not None
        lengths, sequence = self.segments
        parts = np.split(x, np.cumsum(lengths)[:-1], axis=1)
        return np.concatenate([parts[i] for i in sequence], axis=1)

    def restore(self, x: Tensor) -> Tensor:
        """(B, T, ..) as they are laid out -> (B, S, ..) of the new tokens."""
        if self.back is not None:
            return pick_tokens(x, self.back)
        assert self.segments is not None
        lengths, sequence = self.segments
        inverse = sorted(range(len(sequence)), key=sequence.__getitem__)
        return _permuted(x, [lengths[segment] for segment in sequence], inverse)


def parts_of(known: KnownTokens, roles: np.ndarray | None) -> np.ndarray:
    """(B, S) of which part (`PARTS`) each token is; padding is of none (-1).

    Args:
        roles: (B, S), where the system prompt is left out of the textual learner's keys.

    Raises:
        UsageError: it is to be left out, and no token has a role.
    """
    parts = np.where(known.is_perceptual, 1, np.where(known.valid, 0, -1))
    if roles is not None:
        check_roles(roles)
        parts[(parts == 0) & (roles == Role.SYSTEM)] = 2
    return parts


def lay_out(tokens: TokenMap, known: KnownTokens, config: WingsConfig, parts: np.ndarray) -> KeyLayout:
    """The layout of all tokens of a prompt.

    Args:
        known: the tokens, as the host knows them.
        parts: from `parts_of`.
    """
    # text is nobody's key where there is no textual learner, and padding behind the last token need not be told from it
    whole = np.maximum(parts, 0)
    lengths = segment_lengths(whole[0])
    is_right_padded = bool(
        (known.valid.cumsum(axis=1) == known.valid * np.arange(1, parts.shape[1] + 1))[known.valid].all()
    )
    if len(lengths) <= MOST_SEGMENTS and is_right_padded and bool((whole == whole[:1]).all()):
        return _by_segments(whole[0], lengths)
    return _by_index(tokens, config, parts)


def _by_segments(part: np.ndarray, lengths: Sequence[int]) -> KeyLayout:
    starts = list(itertools.accumulate(lengths, initial=0))
    owner = part[starts[:-1]].tolist()
    sequence = tuple(sorted(range(len(lengths)), key=owner.__getitem__))
    ordered = [lengths[segment] for segment in sequence]
    sizes = [sum(n for n, o in zip(lengths, owner, strict=True) if o == i) for i in range(3)]
    return KeyLayout(
        (sizes[0], sizes[1], sizes[2]), tuple(itertools.accumulate(ordered[:-1])), (tuple(lengths), sequence)
    )


def _by_index(tokens: TokenMap, config: WingsConfig, parts: np.ndarray) -> KeyLayout:
    counts = [int((parts == i).sum(axis=1).max()) for i in range(3)]
    # as in `parts_of`: without a textual learner its keys are no part of their own
    of_text = keys_of("textual", tokens, config) if "textual" in config.learners else tokens.is_text
    chosen = (of_text, tokens.is_perceptual, tokens.is_text & ~of_text)
    picked = [first_tokens(each, most) for each, most in zip(chosen, counts, strict=True)]
    index = torch.cat([index for index, _ in picked], dim=1)
    real = torch.cat([real for _, real in picked], dim=1)
    batch, length = parts.shape
    back = index.new_zeros(batch, length + 1)
    places = torch.arange(index.shape[1], device=index.device).expand(batch, -1)
    back.scatter_(1, torch.where(real, index, length), places)  # what fills up lands behind the last token
    sizes = (counts[0], counts[1], counts[2])
    cuts = tuple(cut for cut in itertools.accumulate(counts[:2]) if 0 < cut < index.shape[1])
    return KeyLayout(sizes, cuts, None, index, back[:, :-1], _order(parts, counts))


def _order(parts: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(B, T) the token at each place, as `KeyLayout.index`."""
    order = np.zeros((len(parts), sum(counts)), dtype=np.int64)
    for sample, row in enumerate(parts):
        start = 0
        for part, most in enumerate(counts):
            mine = np.flatnonzero(row == part)
            order[sample, start : start + len(mine)] = mine
            start += most
    return order


def _permuted(x: Tensor, lengths: Sequence[int], sequence: Sequence[int]) -> Tensor:
    if list(sequence) == sorted(sequence):
        return x
    segments = x.split(list(lengths), dim=1)
    return torch.cat([segments[i] for i in sequence], dim=1)
