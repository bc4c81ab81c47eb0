"""LoRRA, the low-rank residual attention learner (Wings, Eq. 4).

Shapes: B batch, Q query rows, K key rows, d stream width, H learner heads, D their width, R rotated width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]  # (cos, sin), each (B, rows, R)


class LowRank(nn.Module):
    """``x -> B A x`` with A (rank, d) normal and B (d, rank) zero at the start."""

    def __init__(self, width: int, rank: int, *, std: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, width, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(width, rank, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.a, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class LoRRA(nn.Module):
    """Multi-head attention whose Q, K, V projections are identity plus low rank, and whose output is low rank only.

    The zero second factors make the output of a fresh learner exactly 0.

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

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        legal: Tensor,
        *,
        query_angles: Angles | None = None,
        key_angles: Angles | None = None,
    ) -> Tensor:
        """Attend from the stream to the decoder's input rows.

        Args:
            query: (B, Q, d).
            keys: (B, K, d) input rows, from which both keys and values are made.
            legal: (B, Q, K) bool. A query without a legal key gets exactly 0.
            query_angles, key_angles: RoPE (cos, sin) of the rows, (B, Q, R) and (B, K, R), R <= D.

        Returns:
            (B, Q, d).
        """
        q, k, v = query + self.q(query), keys + self.k(keys), keys + self.v(keys)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if query_angles is not None and key_angles is not None:
            q, k = rotate(q, query_angles), rotate(k, key_angles)
        speaks = legal.any(dim=-1, keepdim=True)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            # a row of illegal keys only would give NaN in some kernels; it is zeroed below
            attn_mask=(legal | ~speaks)[:, None],
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.head_dim**-0.5,
        )
        return self.o(out.transpose(1, 2).flatten(2)) * speaks


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate the first R channels of (B, H, rows, D) by half-split RoPE; the rest pass through."""
    cos, sin = (table[:, None].to(x.dtype) for table in angles)
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, passed], dim=-1) if passed.shape[-1] else turned


def learner_head_dim(width: int, head_dim: int) -> int:
    """Head width of a learner: the host's own where it divides the stream, else the largest common divisor.

    The identity in Q, K and V fixes the learner's total width to d, which need not be heads * head_dim (Qwen3, Gemma).
    """
    return math.gcd(width, head_dim)


def narrow_angles(angles: Angles, head_dim: int, learner_dim: int) -> Angles:
    """RoPE angles for learner heads of width `learner_dim`, a divisor of the host's `head_dim`.

    Frequency i of a D'-wide RoPE is frequency i * D / D' of a D-wide one with the same base, so every (D / D')-th angle
    is exactly the narrower RoPE, any scaling of the host included.
    """
    step = head_dim // learner_dim
    if step == 1:
        return angles
    halves = [table[..., : table.shape[-1] // 2][..., ::step] for table in angles]
    cos, sin = (torch.cat([h, h], dim=-1) for h in halves)
    return cos, sin
