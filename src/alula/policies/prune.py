"""Pruning: of perceptual tokens a share stays, chosen by a criterion, at one layer or in stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import model_validator

from alula.policies.base import Policy, Stand
from alula.policies.criteria import Criteria, Group, LastQueryAttention, Per
from alula.policies.registry import register
from alula.policies.stages import Stages
from alula.settings import Int, Number


@register
class Prune(Policy):
    """At each stage a share of the perceptual tokens stays, by a criterion, and the others leave.

        Prune(stages=[(2, 0.5)])                           # FastV: behind two layers, half of them
        Prune(stages=[(0, 0.25)], criterion="pooling")     # before the first layer, pooled to a quarter
        Prune(stages=[(8, 0.5), (16, 0.25), (24, 0.125)])  # in stages, as PyramidDrop

    `round(share * tokens)` stay, at least one. Positions stay as they are.

    Attributes:
        stages: (layer, share) in order: the first layer, counted from 0, that the tokens which leave are not in, and
            the share of all perceptual tokens that stays.
        criterion: by what they are chosen.
        per: among whom: the tokens of one image (video, sound), or all of a request. None: of a request, where the
            criterion does not go by places within one image.
    """

    policy_type: ClassVar[str] = "prune"
    stages: tuple[tuple[Int, Number], ...]
    criterion: Criteria = LastQueryAttention()
    per: Per | None = None

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        layers, shares = [layer for layer, _ in self.stages], [share for _, share in self.stages]
        if not layers or layers != sorted(set(layers)):
            raise ValueError("stages need one layer at least, each larger than the one before")
        if shares != sorted(set(shares), reverse=True) or not all(0 < share < 1 for share in shares):
            raise ValueError("shares are between 0 and 1, each smaller than the one before")
        if self.per == "request" and self.criterion.is_of_images:
            raise ValueError(
                f"{self.criterion.name} goes by places within an image, of each of which the share stays: "
                'per="request" has no effect'
            )
        return self

    def place(self, stand: Stand) -> None:
        layers, per = [layer for layer, _ in self.stages], self.per or "request"
        Stages(self.criterion, layers, self._wanted, per, stand.owner).place(stand)

    def _wanted(self, stage: int, groups: Sequence[Group]) -> list[int]:
        _, share = self.stages[stage]
        return [max(1, int(share * group.size + 0.5)) for group in groups]
