"""Attention that the last token pays (FastV, arXiv 2403.06764)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from alula.policies.base import Stand
from alula.policies.criteria.base import Scored
from alula.policies.criteria.candidates import Candidates, Scene
from alula.seam import LayerView


class LastQueryAttention(Scored):
    """The tokens stay that the last token of their sample attends to most, in the layer before, mean over heads.

    FastV, eq. 3, and the row its code reads. Tokens are ranked in the forward they come in, by its last token: a prompt
    in pieces piece by piece, and without a cache anew in every step.
    """

    name: Literal["last_query_attention"] = "last_query_attention"
    reads_attention: ClassVar[bool] = True

    def place(self, stand: Stand, layer: int) -> None:
        stand.weights(layer - 1, _Reader(stand.owner))

    def scores(self, scene: Scene, candidates: Candidates) -> Tensor:
        return candidates.gather(scene.noted("attention"))


class _Reader:
    """Notes the attention that new tokens get from the last one."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def queries(self, view: LayerView) -> Tensor | None:
        """(B, 1) the last valid new token of every sample."""
        if not view.ctx.new_media:
            return None
        valid = view.ctx.tokens.valid
        return (valid * torch.arange(valid.shape[1], device=valid.device)).argmax(dim=1, keepdim=True)

    def on_weights(self, view: LayerView, weights: Tensor) -> None:
        new = view.ctx.tokens.shape[1]
        view.ctx.memo[self.owner, "attention", view.layer] = weights[:, :, 0, -new:].mean(dim=1)
