"""Pruning by attention: perceptual tokens that few look at leave (FastV, arXiv 2403.06764; in stages, 2410.17247)."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from alula.errors import UsageError
from alula.policies.base import Policy, Stand
from alula.policies.registry import register
from alula.seam import LayerView, Work
from alula.settings import Int, Number


@register
class Prune(Policy):
    """At each stage the perceptual tokens that the prompt's last token attends to most stay, and the others leave.

        Prune(stages=[(2, 0.5)])                           # FastV: behind two layers, half of them
        Prune(stages=[(8, 0.5), (16, 0.25), (24, 0.125)])  # in stages, as PyramidDrop

    A token's score is the attention it gets from the last token of its sample in the layer before the stage, mean over
    heads (FastV, eq. 3 and its code's row); `round(share * tokens)` of a sample's perceptual tokens stay, at least one.
    Positions stay as they are. Tokens are ranked in the forward they come in, by its last token: a prompt in pieces
    piece by piece, and without a cache anew in every step.

    Attributes:
        stages: (layer, share) in order: the first layer, counted from 0, that the tokens which leave are not in, and
            the share of all perceptual tokens that stays.
    """

    policy_type: ClassVar[str] = "prune"
    stages: tuple[tuple[Int, Number], ...]

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        layers, shares = [layer for layer, _ in self.stages], [share for _, share in self.stages]
        if not layers or layers != sorted(set(layers)):
            raise ValueError("stages need one layer at least, each larger than the one before")
        if shares != sorted(set(shares), reverse=True) or not all(0 < share < 1 for share in shares):
            raise ValueError("shares are between 0 and 1, each smaller than the one before")
        return self

    def place(self, stand: Stand) -> None:
        count = stand.anatomy.num_layers
        for layer, _ in self.stages:
            if not 0 < layer < count:
                raise UsageError(
                    f"stage at layer {layer}: attention is read in the layer before it, and tokens leave it and those "
                    "behind",
                    where="stages",
                    remedy=f"give layers of 1 to {count - 1}",
                )
        ranking = _Ranking(self, stand.owner)
        for layer, _ in self.stages:
            stand.weights(layer - 1, ranking)
        for layer in range(self.stages[0][0], count):
            stand.work(layer, ranking)


class _Ranking:
    """What one block under a policy asks of the seam; a forward's notes are the forward's."""

    def __init__(self, policy: Prune, owner: str) -> None:
        self.stages, self.owner = policy.stages, owner

    def queries(self, view: LayerView) -> Tensor | None:
        """(B, 1) the last valid new token of every sample."""
        if not view.ctx.new_media:
            return None
        valid = view.ctx.tokens.valid
        return (valid * torch.arange(valid.shape[1], device=valid.device)).argmax(dim=1, keepdim=True)

    def on_weights(self, view: LayerView, weights: Tensor) -> None:
        """Choose who stays from the next layer on."""
        ctx = view.ctx
        stage = next(i for i, (layer, _) in enumerate(self.stages) if layer == view.layer + 1)
        is_perceptual = ctx.tokens.is_perceptual
        left = is_perceptual if not stage else ctx.memo[self.owner, stage - 1].attend & is_perceptual
        scores = weights[:, :, 0, -is_perceptual.shape[1] :].mean(dim=1).masked_fill(~left, -1.0)
        order = scores.argsort(dim=1, descending=True, stable=True)
        wanted = (is_perceptual.sum(dim=1, keepdim=True) * self.stages[stage][1] + 0.5).floor().clamp(min=1)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        stays = left & (torch.zeros_like(order).scatter(1, order, places) < wanted)
        ctx.memo[self.owner, stage] = Work.of(stays | ~is_perceptual)

    def work(self, view: LayerView, hidden: Tensor) -> Work | None:
        """That of the tokens left by the last stage before this layer."""
        if not view.ctx.new_media:
            return None
        passed = sum(layer <= view.layer for layer, _ in self.stages)
        return view.ctx.memo[self.owner, passed - 1]
