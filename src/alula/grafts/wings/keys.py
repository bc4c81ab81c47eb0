"""The keys of a learner, and how many of them each query may see.

Keys and values of both learners are the decoder's input tokens (perceptual tokens for the visual learner, text tokens
for the textual one), shared by all layers. Which key a query may see is decided by true position, kind and validity. In
the order of their positions, the keys a query may see are always the first so many: one number per query says it all.

Shapes: B batch, S new tokens, P cached tokens, T queries in the order they are asked, K key tokens of one learner, d
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.lorra import Block, split_queries
from alula.grafts.wings.order import PARTS, Order, chosen_tokens, first_tokens, order_tokens, pick_tokens
from alula.grafts.wings.rope import Angles, narrow_angles
from alula.seam import ForwardContext


@dataclass(frozen=True)
class Keys:
    """The key rows of one learner, out of all rows of the batch.

    Attributes:
        index: (B, K) places among the P + S tokens, in the order of their positions; samples with fewer keys are filled
            up with place 0, which no query may see.
        part: places of the keys among tokens put in order, if they are.
        tokens: (B, K, d) input tokens.
        counts: (B, T) how many keys, from the first on, each query may see.
        blocks: the queries in blocks, with the number of keys each block needs.
    """

    index: Tensor
    part: slice | None
    tokens: Tensor
    counts: Tensor
    blocks: list[Block]

    @property
    def legal(self) -> Tensor:
        """(B, T, K) bool: the query may see the key."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.counts[..., None]


@dataclass(frozen=True)
class PlanAngles:
    """RoPE angles of the queries as they are asked, of the keys by learner, and of all tokens as they stand."""

    queries: Angles
    keys: dict[str, Angles]
    tokens: Angles

    def last(self, count: int) -> Angles:
        """Of the last so many tokens."""
        return Angles(*(table[:, :, -count:] for table in self.tokens))


@dataclass(frozen=True)
class Plan:
    """What all layers of a forward share: who is asked in which order, and the keys of every learner.

    Attributes:
        order: how tokens are put in order; None: new tokens are asked as they stand, keys are gathered from all.
        keys: by learner; a learner without keys in this batch is left out.
        speaks: (B, S, learners with keys): 1 where the query sees any key.
    """

    order: Order | None
    keys: dict[str, Keys]
    speaks: Tensor
    _angles: dict[str, PlanAngles] = field(default_factory=dict)

    def arrange(self, x: Tensor) -> Tensor:
        """(B, S, ..) of the new tokens -> (B, T, ..) as they are asked."""
        return x if self.order is None else self.order.arrange(x)

    def restore(self, x: Tensor) -> Tensor:
        """(B, T, ..) as they are asked -> (B, S, ..) of the new tokens."""
        return x if self.order is None else self.order.restore(x)

    def pick(self, learner: str, table: Tensor) -> Tensor:
        """(B, P + S, ..) of all tokens -> (B, K, ..) of a learner's keys."""
        keys = self.keys[learner]
        if self.order is not None:
            return self.order.arrange(table)[:, keys.part]
        return pick_tokens(table, keys.index)

    def as_tokens(self, tables: Mapping[str, Tensor]) -> Tensor:
        """(B, K, h, C) of every learner's keys -> (B, h, S, C) of the tokens; 0 at tokens that are nobody's key."""
        assert self.order is not None
        some = next(iter(tables.values()))
        parts = [
            tables[name] if name in tables else some.new_zeros(some.shape[0], size, *some.shape[2:])
            for name, size in zip(PARTS, self.order.sizes, strict=True)
        ]
        return self.order.restore(torch.cat(parts, dim=1)).transpose(1, 2)

    def angles(
        self, forward: ForwardContext, layer_type: str, host_dim: int, head_dim: int, dtype: torch.dtype
    ) -> PlanAngles | None:
        """RoPE angles of the queries, and of the keys by learner, for heads of `head_dim`; None without RoPE."""
        if layer_type not in self._angles:
            tables = forward.all_rope(layer_type)
            if tables is None:
                return None
            cos, sin = narrow_angles(tables, host_dim, head_dim)
            new = forward.tokens.shape[1]
            self._angles[layer_type] = PlanAngles(
                queries=Angles.of(self.arrange(cos[:, -new:]), self.arrange(sin[:, -new:]), dtype),
                keys={name: Angles.of(self.pick(name, cos), self.pick(name, sin), dtype) for name in self.keys},
                tokens=Angles.of(cos, sin, dtype),
            )
        return self._angles[layer_type]


def plan_keys(forward: ForwardContext, config: WingsConfig) -> Plan:
    """The keys of all learners, and how many of them each query may see.

    A key is legal for a query when it stands at or before it (by true position, in the same sample) and neither is
    padding. Under the exact gate the textual learner is silent at tokens that have seen nothing perceptual.
    """
    # behind a cache a query's own keys are not the first it sees
    order = order_tokens(forward.all_tokens, config) if forward.past_tokens is None else None
    inputs = prepared(forward.all_inputs(), config)
    arranged = inputs if order is None else order.arrange(inputs)
    found = {name: _keys_of(name, forward, config, order, arranged) for name in config.learners}
    keys = {name: each for name, each in found.items() if each is not None}
    heard = [each.counts > 0 for each in keys.values()]
    speaks = torch.stack(heard, dim=-1) if heard else inputs.new_zeros(*forward.tokens.shape, 0, dtype=torch.bool)
    if order is not None:
        speaks = order.restore(speaks) & forward.tokens.valid[..., None]  # padding may have no place of its own
    return Plan(order, keys, speaks)


def _keys_of(
    learner: str, forward: ForwardContext, config: WingsConfig, order: Order | None, inputs: Tensor
) -> Keys | None:
    every, new = forward.all_tokens, forward.tokens
    if order is None:
        chosen = chosen_tokens(every, learner, config)
        part, (index, real) = None, first_tokens(chosen)
    else:
        part = order.part(learner)
        index, real = order.index[:, part], order.real[:, part]
    if not index.shape[1]:
        return None
    position = torch.where(real, every.position.gather(1, index), torch.iinfo(torch.int64).max)
    counts = torch.searchsorted(position, new.position.contiguous(), right=True)  # 0 at padding, whose position is -1
    if learner == "textual" and config.gate == "exact":
        counts = counts * every.has_seen[:, -new.shape[1] :]
    if order is None or part is None:
        return Keys(index, None, pick_tokens(inputs, index), counts, split_queries(counts))
    counts = order.arrange(counts)
    return Keys(index, part, inputs[:, part], counts, split_queries(counts, cuts=order.cuts, own=part))


def prepared(x: Tensor, config: WingsConfig) -> Tensor:
    """(.., d) stream or input tokens as the learners take them."""
    # an eps of our own: torch's default is the dtype's, which in bfloat16 is larger than an embedding's mean square
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) if config.normalize else x
