"""Tokens that are far from one another (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from alula.policies.criteria.base import Criterion
from alula.policies.criteria.candidates import Candidates, Scene


class MaxMinDiversity(Criterion):
    """One token after the other stays that is farthest from the nearest of those that stay already, by cosine distance.

    The first is the one whose nearest neighbor is farthest (DivPrune, algorithm 1). Published before layer 0, on what
    the projector gives; here on what the layer is given.
    """

    name: Literal["max_min_diversity"] = "max_min_diversity"

    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        features = torch.nn.functional.normalize(candidates.gather(scene.hidden).to(torch.float32), dim=-1)
        return far_apart(1 - features @ features.mT, candidates)


def far_apart(distance: Tensor, candidates: Candidates) -> Tensor:
    """(U, N) bool: as many candidates as are wanted, greedily as far apart as can be, by their (U, N, N) distances."""
    real, numbers = candidates.real, candidates.numbers
    others = real[:, None] & (numbers != numbers[:, None])
    nearest = distance.masked_fill(~others, torch.inf).amin(dim=2).masked_fill(~real, -torch.inf)
    chosen = torch.zeros_like(real)
    wanted = candidates.wanted_on_device()
    for step in range(max(candidates.wanted)):
        pick = nearest.argmax(dim=1, keepdim=True)
        chosen = chosen | ((numbers == pick) & (wanted > step))
        to_pick = distance.take_along_dim(pick[..., None], dim=1)[:, 0]
        nearest = to_pick.masked_fill(~real, -torch.inf) if not step else nearest.minimum(to_pick)
        nearest = nearest.scatter(1, pick, -torch.inf)
    return chosen & real
