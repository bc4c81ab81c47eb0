"""Images pooled to fewer tokens: down-sampling, which published criteria rarely beat."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from alula.policies.criteria.base import Criterion
from alula.policies.criteria.candidates import Candidates, Scene
from alula.policies.criteria.grid import parts


class Pooling(Criterion):
    """As many equal parts of the image as tokens are wanted (see `Grid`): the token in the middle of each stays, and
    becomes the mean of those in its part."""

    name: Literal["pooling"] = "pooling"
    is_of_images: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        _, stays = parts(candidates)
        return stays

    def into(self, candidates: Candidates) -> Tensor:
        into, _ = parts(candidates)
        return into
