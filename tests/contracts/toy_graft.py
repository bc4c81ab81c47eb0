"""A graft of forty lines, as a package of its own would bring it: a learned vector added to tokens of images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alula.grafts import Graft, GraftConfig, register
from alula.seam import LayerView, Point


class ShiftConfig(GraftConfig):
    """Settings of the toy."""

    graft_type: ClassVar[str] = "toy_shift"
    layers: tuple[int, ...] | None = None


class Shift(nn.Module):
    def __init__(self, name: str, like: nn.Parameter) -> None:
        super().__init__()
        self.graft_name = name
        self.vector = nn.Parameter(torch.zeros(like.shape[-1:], dtype=like.dtype, device=like.device))

    def add(self, view: LayerView, hidden: Tensor) -> Tensor | None:
        if view.ctx.is_disabled(self.graft_name) or not view.ctx.any_media:
            return None
        return torch.where(view.tokens.is_perceptual[..., None], hidden + self.vector, hidden)


class ShiftGraft(Graft):
    def build_layer(self, index: int) -> nn.Module:
        return Shift(self.name, next(self.seam.anatomy.layers[index].parameters()))

    def place(self, index: int, module: Any) -> None:
        self.on(Point.BLOCK_OUTPUT, index, module.add)

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        return {"toy_shift": list(self.parameters())}


register(ShiftConfig, ShiftGraft)
