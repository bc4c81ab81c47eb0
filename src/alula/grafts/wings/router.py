"""Routers: two weights per token, for the visual and the textual learner, that add up to 1 (Wings, Eq. 5).

Shapes: B batch, Q query tokens, K key tokens, H heads of the main attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.errors import UsageError
from alula.tokens import TokenMap


class Router(nn.Module):
    """Base: `columns` says which sums of attention it needs, `forward` turns them into weights."""

    def columns(self, tokens: TokenMap) -> Tensor | None:
        """(B, K, C) values per key whose attention-weighted sums are needed, or None."""
        return None

    def forward(self, sums: Tensor | None) -> Tensor:
        """(B, Q, H, C) sums -> (B, Q, 2) or (2,) weights: visual, textual."""
        raise NotImplementedError


class AttentionRouter(Router):
    """A weight per key position and learner, summed with the attention of each query, mean over heads (Eq. 5).

    Positions count valid tokens, so padding does not shift the weights. Starts at equal weights.
    """

    def __init__(self, tokens: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, tokens, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))

    def columns(self, tokens: TokenMap) -> Tensor:
        if tokens.shape[1] > self.weight.shape[1]:
            raise UsageError(
                f"the input has {tokens.shape[1]} tokens, the attention router has weights for "
                f"{self.weight.shape[1]} positions",
                remedy='shorten the input, train with a larger router_tokens, or use router="mass" (length-free)',
            )
        picked = F.embedding(tokens.position.clamp(min=0), self.weight.T)
        return picked * tokens.valid[..., None]

    def forward(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        mean = _wide(sums).mean(dim=2)
        return torch.softmax(mean + self.bias.to(mean.dtype), dim=-1)


class MassRouter(Router):
    """Each head's attention on perceptual tokens, through one linear map. Independent of length; starts equal."""

    def __init__(self, heads: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, heads, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))

    def columns(self, tokens: TokenMap) -> Tensor:
        return tokens.is_perceptual[..., None].to(self.weight.dtype)

    def forward(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        mass = _wide(sums[..., 0])
        return torch.softmax(F.linear(mass, self.weight.to(mass.dtype), self.bias.to(mass.dtype)), dim=-1)


class ConstantRouter(Router):
    """One learned pair of weights for all tokens."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))

    def forward(self, sums: Tensor | None) -> Tensor:
        return torch.softmax(_wide(self.bias), dim=-1)


def _wide(x: Tensor) -> Tensor:
    """At least float32: half precision would round router weights to three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
