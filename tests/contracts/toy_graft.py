"""A graft of forty lines, as a package of its own would bring it: a learned vector added to tokens of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alula.grafts import Graft, GraftConfig, register
from alula.seam import NAME, with_keywords


@dataclass(frozen=True)
class ShiftConfig(GraftConfig):
    """Settings of the toy."""

    graft_type: ClassVar[str] = "toy_shift"
    layers: tuple[int, ...] | None = None


class Shift(nn.Module):
    def __init__(self, name: str, like: nn.Parameter) -> None:
        super().__init__()
        self.graft_name = name
        self.vector = nn.Parameter(torch.zeros(like.shape[-1:], dtype=like.dtype, device=like.device))

    @with_keywords
    def after_layer(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ctx = kwargs.get(NAME)
        if ctx is None or ctx.is_disabled(self.graft_name) or not ctx.any_media:
            return output
        return torch.where(ctx.tokens.is_perceptual[..., None], output + self.vector, output)


class ShiftGraft(Graft):
    def build_layer(self, index: int) -> nn.Module:
        return Shift(self.name, next(self.seam.anatomy.layers[index].parameters()))

    def hook_layer(self, index: int, module: Any) -> list[RemovableHandle]:
        return [self.seam.anatomy.layers[index].register_forward_hook(module.after_layer, with_kwargs=True)]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"toy_shift": list(self.parameters())}


register(ShiftConfig, ShiftGraft)
