"""LoRRA, the low-rank residual attention learner (Wings, Eq. 4).

Shapes: B batch, Q query tokens, K key tokens, d stream width, H learner heads, D their width, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.grafts.wings.rope import Angles, rotate


class Block(NamedTuple):
    """Queries `start` to `stop`: each sees at least the first `least` keys and at most the first `most`, or none.

    In an `own` block the queries are the tokens the keys are made of, and each sees those up to itself.
    """

    start: int
    stop: int
    least: int
    most: int
    own: bool = False


class LowRank(nn.Module):
    """``x -> up down x`` with `down` (rank, d) normal and `up` (d, rank) zero at the start."""

    def __init__(self, width: int, rank: int, *, std: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(width, rank, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.down, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_up(self.apply_down(x))

    def apply_down(self, x: Tensor) -> Tensor:
        """(.., d) -> (.., r)."""
        return F.linear(x, self.down.to(x.dtype))

    def apply_up(self, z: Tensor) -> Tensor:
        """(.., r) -> (.., d)."""
        return F.linear(z, self.up.to(z.dtype))


class LoRRA(nn.Module):
    """Multi-head attention whose Q, K, V projections are identity plus low rank, and whose output is low rank only.

    With `up` zero, the output of a fresh learner is exactly 0.

    What a key token contributes is its input token x, which all layers share, and its factors z (down_k x, down_v x),
    2 r numbers of this layer. While prefilling, keys and values written out (x + up z) and a fused attention kernel are
    cheapest. For few queries (decoding) the values are never made: sum_j p_j (x_j + up_v z_j) = sum_j p_j x_j + up_v
    sum_j p_j z_j.

    Args:
        width: d of the decoder's stream.
        head_dim: D; must divide `width`.
        rank: of every projection.
        dropout: on attention weights, in training.
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        rank: int,
        *,
        std: float = 0.02,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout = head_dim, dropout
        self.q, self.k, self.v, self.o = (
            LowRank(width, rank, std=std, device=torch.device(device), dtype=dtype) for _ in range(4)
        )

    def factors(self, tokens: Tensor) -> Tensor:
        """(B, tokens, d) input tokens -> (B, tokens, 2 r): what `k` and `v` project down to."""
        return torch.cat([self.k.apply_down(tokens), self.v.apply_down(tokens)], dim=-1)

    def forward(
        self,
        query: Tensor,
        tokens: Tensor,
        counts: Tensor,
        *,
        query_angles: Angles | None = None,
        key_angles: Angles | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> Tensor:
        """Attend from the stream to the decoder's input tokens.

        Args:
            query: (B, Q, d).
            tokens: (B, K, d) input tokens, from which keys and values are made, in the order of their positions.
            counts: (B, Q) how many of the tokens, from the first on, each query may see. With none it gets exactly 0.
            query_angles, key_angles: to be read next to (B, H, tokens, D).
            blocks: how to split the queries; `split_queries` of the counts by default.

        Returns:
            (B, Q, d).
        """
        key_factors, value_factors = self.factors(tokens).chunk(2, dim=-1)
        keys = self.expand_keys(tokens, key_factors, key_angles)
        blocks = split_queries(counts) if blocks is None else blocks
        heard = self.listen(query, tokens, keys, value_factors, counts, blocks, query_angles)
        return self.o.apply_up(heard.masked_fill((counts == 0)[..., None], 0.0))

    def expand_keys(self, tokens: Tensor, factors: Tensor, angles: Angles | None) -> Tensor:
        """(B, H, K, D) keys, ready to be asked, of (B, K, d) tokens and their (B, K, r) factors."""
        keys = self.heads(tokens + self.k.apply_up(factors))
        return keys if angles is None else rotate(keys, angles)

    def listen(
        self,
        query: Tensor,
        tokens: Tensor,
        keys: Tensor,
        value_factors: Tensor,
        counts: Tensor,
        blocks: Sequence[Block],
        angles: Angles | None,
    ) -> Tensor:
        """`forward` before the second factor of the output, which several learners may share: (B, Q, r).

        Queries that see no key get something finite here, for the caller to set to 0.

        Args:
            keys: (B, H, K, D) from `expand_keys`.
            value_factors: (B, K, r).
            blocks: how to split the queries; from `split_queries`.
            angles: of the queries.
        """
        q = self.heads(query + self.q(query))
        if angles is not None:
            q = rotate(q, angles)
        dropout = self.dropout if self.training else 0.0
        if query.shape[1] < self.head_dim and not dropout:
            out = self._few(q, keys, tokens, value_factors, counts, blocks)
        else:
            out = self._many(q, keys, self.heads(tokens + self.v.apply_up(value_factors)), counts, blocks, dropout)
        return self.o.apply_down(out.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """(B, tokens, d) -> (B, H, tokens, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _many(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, blocks: Sequence[Block], dropout: float) -> Tensor:
        """(B, H, Q, D), a block of queries at a time: no mask is ever larger than a block."""
        parts = []
        for block in blocks:
            queries = q[:, :, block.start : block.stop]
            # neither causal nor equal queries need a mask, which lets the fastest kernels in
            equal = block.own or block.least == block.most
            heard = F.scaled_dot_product_attention(
                queries,
                k[:, :, : block.most],
                v[:, :, : block.most],
                attn_mask=None if equal else _mask(counts, block),
                is_causal=block.own,
                dropout_p=dropout,
                scale=self.head_dim**-0.5,
            )
            parts.append(heard if block.most else torch.zeros_like(queries))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _few(
        self, q: Tensor, k: Tensor, tokens: Tensor, value_factors: Tensor, counts: Tensor, blocks: Sequence[Block]
    ) -> Tensor:
        """(B, H, Q, D) without values: attended values of the tokens, and `v.up` of attended factors."""
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        if any(block.own or block.least < tokens.shape[1] for block in blocks):
            every = Block(0, q.shape[2], 0, tokens.shape[1])
            scores = scores.masked_fill(~_mask(counts, every), torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(tokens.dtype)
        value_factors = value_factors.to(weights.dtype)  # what was kept may come from under autocast
        heard = (weights.flatten(1, 2) @ value_factors).unflatten(1, weights.shape[1:3])  # (B, H, Q, r)
        raised = self.v.up.to(heard.dtype).unflatten(0, (-1, self.head_dim))  # (H, D, r)
        return weights @ self.heads(tokens) + heard @ raised.transpose(-1, -2)


def split_queries(
    counts: Tensor, size: int = 512, *, cuts: Sequence[int] = (), own: slice | None = None
) -> list[Block]:
    """Blocks of queries, each with the keys it needs. Reads the device once.

    Args:
        counts: (B, Q) how many keys each query may see.
        size: the most queries in a block that needs a mask.
        cuts: queries in front of which a block shall end.
        own: the queries that the keys are made of, if all keys are among them: a block of their own.
    """
    bounds = sorted({0, *cuts, counts.shape[1], *([own.start, own.stop] if own is not None else [])})
    spans: list[tuple[int, int, bool]] = []
    for start, stop in itertools.pairwise(bounds):
        if own is not None and own.start <= start < own.stop:
            if start == own.start:
                spans.append((own.start, own.stop, True))
            continue
        spans += [(at, min(at + size, stop), False) for at in range(start, stop, size)]
    least_and_most = []
    for start, stop, _ in spans:
        chunk = counts[:, start:stop]
        most = chunk.max()
        least_and_most.append(torch.stack([torch.where(chunk > 0, chunk, most).min(), most]))
    extremes = torch.stack(least_and_most).tolist()
    return [
        Block(start, stop, least, stop - start if alone else most, alone)
        for (start, stop, alone), (least, most) in zip(spans, extremes, strict=True)
    ]


def _mask(counts: Tensor, block: Block) -> Tensor:
    """(B, 1, block, keys) bool. A query without keys sees the first: its output is zeroed, but must not be NaN."""
    place = torch.arange(block.most, device=counts.device)
    return place < counts[:, None, block.start : block.stop, None].clamp(min=1)
