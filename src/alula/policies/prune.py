"""Pruning: of perceptual tokens a share stays, chosen by a criterion, at one layer or in stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from alula.policies.base import Policy, Stand
from alula.policies.criteria import (
    Criteria,
    Criterion,
    Group,
    LastQueryAttention,
    Merge,
    Per,
    RopeFreeAttention,
    Scored,
    check_merge,
)
from alula.policies.registry import register
from alula.policies.stages import Positions, Stages
from alula.settings import Int, Number


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _share(value: Any) -> Any:
    if isinstance(value, str) and value != "knee":
        raise ValueError('a share is wanted here, or "knee"')
    return value


def _stages(value: Any) -> Any:
    if isinstance(value, list | tuple) and not all(isinstance(each, list | tuple) for each in value):
        raise ValueError("stages are pairs of a layer and the share that stays: write [(2, 0.5)], one pair for a stage")
    return value


Share = Annotated[Number | Literal["knee"], BeforeValidator(_share)]


@register
class Prune(Policy):
    """At each stage a share of the perceptual tokens stays, by a criterion, and the others leave.

        Prune(stages=[(2, 0.5)])                           # FastV: behind two layers, half of them
        Prune(stages=[(0, 0.25)], criterion="pooling")     # before the first layer, pooled to a quarter
        Prune(stages=[(8, 0.5), (16, 0.25), (24, 0.125)])  # in stages, as PyramidDrop

    `round(share * tokens)` stay, at least one.

    Attributes:
        stages: (layer, share) in order: the first layer, counted from 0, that the tokens which leave are not in, and
            the share of all perceptual tokens that stays. "knee": as many as stand above the knee of the curve of their
            sorted scores, image by image or request by request (arXiv 2409.01162).
        criterion: by what they are chosen; several: one for each stage.
        per: among whom: the tokens of one image (video, sound), or all of a request. None: of a request, where no
            criterion goes by places within one image.
        merge: those that leave are merged into those that stay (see `criteria.merging`); None: they are gone.
        positions: those that stay, and text, keep theirs, with gaps ("keep"), or are counted anew behind every stage
            ("dense", as PyramidDrop, and whoever prunes before the decoder). Windows, and grafts that turn queries of
            their own, go by the positions of the other layers.
    """

    policy_type: ClassVar[str] = "prune"
    stages: Annotated[tuple[tuple[Int, Share], ...], BeforeValidator(_stages)]
    criterion: Annotated[tuple[Criteria, ...], BeforeValidator(_several)] = (LastQueryAttention(),)
    per: Per | None = None
    merge: Merge | None = None
    positions: Positions = "keep"

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        layers = [layer for layer, _ in self.stages]
        shares = [share for _, share in self.stages if not isinstance(share, str)]
        if not layers or layers != sorted(set(layers)):
            raise ValueError("stages need one layer at least, each larger than the one before")
        if shares != sorted(set(shares), reverse=True) or not all(0 < share < 1 for share in shares):
            raise ValueError("shares are between 0 and 1, each smaller than the one before")
        if len(self.criterion) not in (1, len(layers)):
            raise ValueError(f"{len(self.criterion)} criteria for {len(layers)} stages: give one, or one for each")
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        criteria = self._criteria()
        places = next((each.name for each in criteria if each.is_of_images), None)
        if self.per == "request" and places:
            raise ValueError(
                f"{places} goes by places within an image, of each of which the share stays: "
                'per="request" has no effect'
            )
        is_cut = False
        for (_, share), criterion in zip(self.stages, criteria, strict=True):
            if is_cut and criterion.is_of_images:
                raise ValueError(f"behind a knee nobody knows how many tokens {criterion.name} is to place evenly")
            is_cut = is_cut or share == "knee"
            if self.positions == "dense" and len(criteria) > 1 and isinstance(criterion, RopeFreeAttention):
                raise ValueError("rope_free_attention turns back by the host's positions: dense ones are for one stage")
            if share == "knee" and not isinstance(criterion, Scored):
                raise ValueError(f"{criterion.name} gives no scores, whose curve could have a knee: give a share")
            if share == "knee" and self.merge is not None:
                raise ValueError("merging needs to know how many stay: give a share in the place of the knee")
            check_merge(self.merge, criterion)
        return self

    def _criteria(self) -> Sequence[Criterion]:
        """One for each stage."""
        return self.criterion * len(self.stages) if len(self.criterion) == 1 else self.criterion

    @property
    def concerns_text(self) -> bool:
        return False

    def place(self, stand: Stand) -> None:
        stages = [(layer, criterion) for (layer, _), criterion in zip(self.stages, self._criteria(), strict=True)]
        Stages(stages, self._wanted, self.per or "request", stand.owner, self.merge, self.positions).place(stand)

    def _wanted(self, stage: int, groups: Sequence[Group]) -> list[int] | None:
        _, share = self.stages[stage]
        return None if isinstance(share, str) else [max(1, int(share * group.size + 0.5)) for group in groups]
