"""Routers: two weights per token, for the visual and the textual learner, that add up to 1 (Wings, Eq. 5).

Shapes: B batch, Q query tokens, K key tokens, H heads of the main attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.errors import UsageError
from alula.grafts.wings.config import WingsConfig
from alula.tokens import TokenMap


class Router(nn.Module):
    """Base: `key_values` says which sums of attention it needs, `forward` turns them into weights.

    Attributes:
        values_are_shared: whether the routers of all layers have the same `key_values`.
    """

    values_are_shared: ClassVar[bool] = False

    def key_values(self, tokens: TokenMap) -> Tensor | None:
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

    def key_values(self, tokens: TokenMap) -> Tensor:
        (values,) = looked_up([self], tokens, self.weight.dtype)
        return values

    def forward(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        mean = sums.mean(dim=2, dtype=_wide_dtype(sums))
        return torch.softmax(mean + self.bias.to(mean.dtype), dim=-1)


class PublishedRouter(AttentionRouter):
    """Softmax over SiLU of a weight per absolute key position, summed with the attention of all heads, plus a bias."""

    def forward(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        return torch.softmax(F.silu(sums.sum(dim=2, dtype=torch.float32) + self.bias.float()), dim=-1)


class MassRouter(Router):
    """Each head's attention on perceptual tokens, through one linear map. Independent of length; starts equal."""

    values_are_shared = True

    def __init__(self, heads: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, heads, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))

    def key_values(self, tokens: TokenMap) -> Tensor:
        return tokens.is_perceptual[..., None].to(self.weight.dtype)

    def forward(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        mass = _wide(sums.squeeze(-1))
        weight, bias = _in_dtype(self.weight, mass.dtype), _in_dtype(self.bias, mass.dtype)
        return torch.softmax(F.linear(mass, weight, bias), dim=-1)


class ConstantRouter(Router):
    """One learned pair of weights for all tokens."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))

    def forward(self, sums: Tensor | None) -> Tensor:
        return torch.softmax(_wide(self.bias), dim=-1)


def build_router(config: WingsConfig, heads: int, *, device: torch.device, dtype: torch.dtype) -> Router | None:
    """The router of `config` for a decoder of `heads` attention heads; None for a single learner."""
    if len(config.learners) == 1:
        return None
    if config.compat == "published":
        return PublishedRouter(config.router_tokens, device=device, dtype=dtype)
    match config.router:
        case "attention":
            return AttentionRouter(config.router_tokens, device=device, dtype=dtype)
        case "mass":
            return MassRouter(heads, device=device, dtype=dtype)
        case "constant":
            return ConstantRouter(device=device, dtype=dtype)


def looked_up(routers: Sequence[AttentionRouter], tokens: TokenMap, dtype: torch.dtype) -> Sequence[Tensor]:
    """By router (B, K, 2) `key_values`, looked up for all layers together.

    Args:
        routers: with weights for equally many positions, on the device of the tokens.
        dtype: of the values.

    Raises:
        UsageError: the input is longer than that.
    """
    positions = routers[0].weight.shape[1]
    if tokens.shape[1] > positions:
        raise UsageError(
            f"the input has {tokens.shape[1]} tokens, the attention router has weights for {positions} positions",
            remedy='shorten the input, train with a larger router_tokens, or use router="mass" (length-free)',
        )
    weights = routers[0].weight if len(routers) == 1 else torch.cat([router.weight for router in routers])
    picked = F.embedding(tokens.position.clamp(min=0), weights.T) * tokens.valid[..., None]
    return picked.to(dtype).split(2, dim=-1)


def _wide_dtype(x: Tensor) -> torch.dtype:
    """At least float32: half precision would round router weights to three digits."""
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return _in_dtype(x, _wide_dtype(x))


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype; itself where it is in that: `to` takes longer to find out, in every layer of every step."""
    return x if x.dtype == dtype else x.to(dtype)
