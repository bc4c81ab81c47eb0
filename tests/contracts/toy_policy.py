"""A policy of forty lines, as a package of its own would bring it: attention to images turned down in some layers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from alula.policies import Policy, Stand, register
from alula.seam import LayerView
from alula.settings import Number


class _Bias:
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def key_bias(self, view: LayerView) -> Tensor | None:
        ctx = view.ctx
        if not ctx.any_media:
            return None
        is_image = ctx.all_tokens.is_perceptual[:, None, None]
        return torch.where(is_image, -self.strength, 0.0)


@register
class Dim(Policy):
    """Settings of the toy."""

    policy_type: ClassVar[str] = "toy_dim"
    strength: Number = 3.0
    layers: tuple[int, ...] | None = None

    def place(self, stand: Stand) -> None:
        for layer in stand.anatomy.layer_indices(self.layers):
            stand.bias(layer, _Bias(self.strength))
