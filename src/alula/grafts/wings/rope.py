"""Half-split RoPE for the learners, with the host's own angles.

Shapes: B batch, H learner heads, D their width, R rotated width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """RoPE angles of some tokens, shaped to be read next to what is rotated: (.., R) cosines, (.., R / 2) sines."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Angles:
        """From a host's (B, tokens, R) tables, for heads of (B, H, tokens, D)."""
        half = sin[..., : sin.shape[-1] // 2]
        return cls(cos[:, None].to(dtype or cos.dtype), half[:, None].to(dtype or sin.dtype))


def rotate(x: Tensor, angles: Angles, out: Tensor | None = None) -> Tensor:
    """Rotate the first R channels of (.., D) heads; the rest pass through.

    Args:
        out: where to write the result, of the shape of `x`; without gradients only.
    """
    if out is None and torch.is_grad_enabled():
        return _Rotation.apply(x, *angles)
    return _rotated(x, *angles, out)


class _Rotation(torch.autograd.Function):
    """Its backward turns back. Autograd's own would copy each half several times over."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rotated(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *of_angles: Tensor | None) -> Tensor:
        return _rotated(tangent, *ctx.saved_tensors)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Writes each half once and copies none: over many tokens this is a good part of what a learner costs."""
    width = cos.shape[-1]
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    if width == x.shape[-1]:
        turned = torch.mul(x, cos, out=out)
    else:
        turned = torch.cat([x[..., :width] * cos, x[..., width:]], dim=-1)
    turned[..., : width // 2].addcmul_(second, sin, value=-1)
    turned[..., width // 2 : width].addcmul_(first, sin)
    return turned


def learner_head_dim(width: int, head_dim: int) -> int:
    """Head width of a learner: the host's own where it divides the stream, else the largest common divisor.

    The identity in Q, K and V fixes the learner's total width to d, which need not be heads * head_dim (Qwen3, Gemma).
    """
    return math.gcd(width, head_dim)


def narrow_angles(tables: tuple[Tensor, Tensor], head_dim: int, learner_dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) tables for learner heads of width `learner_dim`, a divisor of the host's `head_dim`.

    Frequency i of a D'-wide RoPE is frequency i * D / D' of a D-wide one with the same base, so every (D / D')-th angle
    is exactly the narrower RoPE, any scaling of the host included.
    """
    step = head_dim // learner_dim
    if step == 1:
        return tables
    halves = [table[..., : table.shape[-1] // 2][..., ::step] for table in tables]
    cos, sin = (torch.cat([h, h], dim=-1) for h in halves)
    return cos, sin
