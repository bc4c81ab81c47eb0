"""Tokens drawn at random: what every other criterion has to be better than."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from alula.draws import mixed
from alula.policies.criteria.base import Scored
from alula.policies.criteria.candidates import Candidates, Scene
from alula.settings import Int


class Random(Scored):
    """The tokens stay that are drawn: by the seed, the number of the image in its prompt, and how many tokens it has.

    Those of a later stage are among those of the stage before.

    Attributes:
        seed: another one draws others.
    """

    name: Literal["random"] = "random"
    seed: Int = 0

    def scores(self, scene: Scene, candidates: Candidates) -> Tensor:
        drawn = []
        for group in candidates.groups:
            generator = torch.Generator().manual_seed(mixed(self.seed, group.item, group.size) >> 1)
            drawn.append(torch.rand(group.size, generator=generator).numpy())
        return candidates.table(drawn).gather(1, candidates.place)
