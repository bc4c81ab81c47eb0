"""What leaves is merged into what stays (PruMerge, arXiv 2403.15388; VisionZip, 2412.04467)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from alula.policies.criteria.base import Criterion, named
from alula.policies.criteria.candidates import Candidates, Scene
from alula.settings import Number, Settings
from alula.tokens import on_device


class Nearest(Settings):
    """Every token that leaves joins the most similar one that stays, which becomes the mean of itself and these.

    PruMerge without its weights. Similar is by the cosine of what the layer is given.
    """

    name: Literal["nearest"] = "nearest"

    def choose(self, criterion: Criterion, scene: Scene, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """(U, N) bool the candidates that stay, (U, N) whom each joins."""
        stays = criterion.choose(scene, candidates)
        return stays, joined(candidates.gather(scene.hidden), candidates, candidates.real & ~stays, stays)

    def merged(self, hidden: Tensor, candidates: Candidates, into: Tensor) -> Tensor:
        """(B, S, d) hidden states in which those that others join are changed."""
        return candidates.merged(hidden, into)


class Contextual(Settings):
    """Some of those that stay are chosen evenly from what the criterion leaves over, and the rest of that joins the
    most similar of these, to which the mean of what joins it is added (VisionZip).

    Similar is by the cosine of what the layer is given; published, of the tower's keys.

    Attributes:
        share: of those that stay, chosen evenly; VisionZip has 10 of 64.
    """

    name: Literal["contextual"] = "contextual"
    share: Number = Field(default=10 / 64, gt=0, lt=1)

    def choose(self, criterion: Criterion, scene: Scene, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """(U, N) bool the candidates that stay, (U, N) whom each joins."""
        wanted = candidates.wanted
        over = [self.places(each) for each in wanted]
        dominant = candidates.wanting(tuple(each - some for each, some in zip(wanted, over, strict=True)))
        stays = criterion.choose(scene, dominant)
        targets = evenly(dominant, stays, over)
        leaves = dominant.real & ~stays & ~targets
        return stays | targets, joined(dominant.gather(scene.hidden), dominant, leaves, targets)

    def places(self, wanted: int) -> int:
        """How many of those that stay others are merged into."""
        return min(int(self.share * wanted + 0.5), wanted - 1)

    def merged(self, hidden: Tensor, candidates: Candidates, into: Tensor) -> Tensor:
        """(B, S, d) hidden states in which those that others join are changed."""
        return candidates.merged(hidden, into, is_added=True)


def evenly(candidates: Candidates, stays: Tensor, over: list[int]) -> Tensor:
    """(U, N) bool: so many of every group's candidates that do not stay, from the first at a whole stride."""
    pairs = zip(candidates.counts, candidates.wanted, over, strict=True)
    strides = [max(1, (count - wanted) // some) if some else 1 for count, wanted, some in pairs]
    stride, most = (on_device(np.array(each), stays.device)[:, None] for each in (strides, over))
    left = candidates.real & ~stays
    rank = left.cumsum(dim=1) - 1
    return left & (rank % stride == 0) & (rank // stride < most)


def joined(features: Tensor, candidates: Candidates, leaves: Tensor, targets: Tensor) -> Tensor:
    """(U, N) the target most similar to each candidate that leaves, by cosine of (U, N, d); to others themselves."""
    features = torch.nn.functional.normalize(features.to(torch.float32), dim=-1)
    nearest = (features @ features.mT).masked_fill(~targets[:, None], -torch.inf).argmax(dim=2)
    is_joined = leaves & targets.any(dim=1, keepdim=True)
    return torch.where(is_joined, nearest, candidates.numbers)


Merge = Annotated[Annotated[Nearest | Contextual, Field(discriminator="name")], BeforeValidator(named)]
"""a way to merge as a setting: itself, its name alone, or a mapping of its settings with its name"""


def check_merge(merge: Merge | None, criterion: Criterion) -> None:
    """Refuse to merge what a criterion lets go of where that has no effect, or cannot be.

    Raises:
        ValueError: so it is.
    """
    if merge is not None and criterion.merges:
        raise ValueError(f"{criterion.name} merges by itself: merge has no effect")
    if merge is not None and criterion.reads_itself:
        raise ValueError("what is merged enters the layer, whose own attention is not known before it does")
