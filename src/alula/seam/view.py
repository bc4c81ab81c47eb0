"""Which of a forward's tokens stand in one decoder layer, where something took tokens out on the way.

Usually all of them do, and a layer's cache holds all tokens so far. Hooks that withdraw tokens (image tokens behind
some layer, say) leave fewer; what is known of tokens is then matched to those that are left by index, never by length.

Shapes: B batch, S new tokens of the forward, M of them in the layer, P cached tokens, K keys of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alula.errors import SeamError
from alula.tokens import TokenMap


@dataclass(frozen=True, eq=False, init=False)
class LayerView:
    """One decoder layer in one forward.

    Attributes:
        ctx: the `ForwardContext`.
        layer: index of the decoder layer.
        tokens: TokenMap of the tokens in it, (B, M).
        index: (B, M) of them among the forward's new tokens; None where all are there.
        key_index: (B, K) of the keys its attention is given, among all P + S tokens; None where all are there.
        real: (B, M) bool: the token stands there; the others only fill up a sample that has fewer, and are padding in
            `tokens`. None: all do.
    """

    ctx: Any
    layer: int
    tokens: TokenMap
    index: Tensor | None
    key_index: Tensor | None
    real: Tensor | None

    def __init__(
        self,
        ctx: Any,
        layer: int,
        tokens: TokenMap,
        index: Tensor | None = None,
        key_index: Tensor | None = None,
        real: Tensor | None = None,
    ) -> None:
        # several are made in every layer, and what a frozen dataclass sets field by field takes four times as long
        self.__dict__.update(ctx=ctx, layer=layer, tokens=tokens, index=index, key_index=key_index, real=real)

    def pick(self, values: Tensor) -> Tensor:
        """(B, M, ..) of the tokens in this layer, from the (B, S, ..) of all."""
        return values if self.index is None else gather(values, self.index)

    def pick_real(self, values: Tensor) -> Tensor:
        """The same, 0 (False) where a token only fills up its sample: one without work, which need not be padding."""
        values = self.pick(values)
        return values if self.real is None else values.masked_fill(~widened(self.real.to(values.device), values), 0)

    def spread(self, values: Tensor) -> Tensor:
        """(B, S, ..) of all tokens, from the (B, M, ..) of those in this layer; 0 at the others."""
        if self.index is None:
            return values
        index = widened(self.index, values)
        if self.real is not None:
            values = values.masked_fill(~widened(self.real, values), 0)
        every = values.new_zeros(len(values), self.ctx.tokens.shape[1], *values.shape[2:])
        return every.scatter(1, index.expand_as(values), values)

    @cached_property
    def present(self) -> Tensor | None:
        """(B, S) bool: the token stands in this layer; None where all do."""
        return None if self.index is None else self.spread(torch.ones_like(self.index, dtype=torch.bool))

    def pick_keys(self, values: Tensor) -> Tensor:
        """(B, K, ..) of the keys in this layer, from the (B, P + S, ..) of all tokens."""
        return values if self.key_index is None else gather(values, self.key_index)

    def spread_keys(self, values: Tensor) -> Tensor:
        """(.., P + S) of all tokens, from the (.., K) of the keys in this layer; 0 at the others.

        A sliding cache keeps the last keys, one of fixed size has a blank tail.
        """
        every = self.ctx.all_tokens.shape[1]
        if self.key_index is None:
            missing = max(every - values.shape[-1], 0)
            return torch.nn.functional.pad(values, (missing, 0))[..., :every]
        index = self.key_index.view(len(self.key_index), *(1 for _ in values.shape[1:-1]), -1).expand_as(values)
        return values.new_zeros(*values.shape[:-1], every).scatter_add(-1, index, values)

    def rows(self, queries: Tensor) -> Tensor:
        """(B, n) where the forward's new tokens at (B, n) `queries` stand among those of this layer.

        Raises:
            SeamError: one of them is not there.
        """
        if self.index is None:
            return queries
        same = self.index[:, None, :] == queries[..., None]
        if self.real is not None:
            same = same & self.real[:, None, :]
        if not bool(same.any(dim=-1).all()):
            raise SeamError(
                f"a token whose attention in decoder layer {self.layer} was asked for is not there",
                remedy="have it computed in that layer, or ask for the attention of another",
            )
        return same.to(torch.uint8).argmax(dim=-1)

    def pick_pairs(self, pairs: Tensor) -> Tensor:
        """(B, H, M, K) of this layer's queries and keys, from (B or 1, H, S or 1, P + S) of all; M = 1 where S = 1."""
        if self.index is not None and pairs.shape[2] > 1:
            pairs = gather(pairs.transpose(1, 2), self.index).transpose(1, 2)
        if self.key_index is not None:
            pairs = gather(pairs.movedim(-1, 1), self.key_index).movedim(1, -1)
        return pairs

    def matched(self, hidden: Tensor) -> Tensor:
        """(B, M, d) of this layer's tokens, from hidden states of these or of all tokens.

        Raises:
            SeamError: they are of other tokens.
        """
        if hidden.shape[1] == self.tokens.shape[1]:
            return hidden
        if hidden.shape[1] == self.ctx.tokens.shape[1]:
            return self.pick(hidden)
        raise SeamError(
            f"decoder layer {self.layer} was entered by {hidden.shape[1]} tokens and holds {self.tokens.shape[1]}",
            remedy="take tokens out of a layer once",
        )


def gather(values: Tensor, index: Tensor) -> Tensor:
    """(B, M, ..) entries of (B or 1, N, ..) at (B, M)."""
    values = values.expand(len(index), *values.shape[1:])
    index = widened(index.to(values.device), values)
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def widened(index: Tensor, values: Tensor) -> Tensor:
    """(B, M) with as many dimensions as (B, any, ..) values."""
    return index.view(*index.shape, *(1 for _ in values.shape[2:]))


def located(left: Sequence[Tensor], every: Sequence[Tensor], batch: int) -> Tensor | None:
    """(B, M) where the tokens of (B or 1, M, R) tables stand among those of (B or 1, S, R) ones, e.g. of RoPE angles.

    None where a token is not found, or could be one of several.
    """
    found = None
    for a, b in zip(left, every, strict=True):
        for channel in range(a.shape[-1]):
            same = a[:, :, None, channel] == b[:, None, :, channel]
            found = same if found is None else found & same
    if found is None or not bool((found.sum(dim=-1) == 1).all()):
        return None
    return found.to(torch.int64).argmax(dim=-1).expand(batch, -1)
