"""The contract of a criterion: by what perceptual tokens are chosen that stay."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor

from alula.policies.base import Stand
from alula.policies.criteria.candidates import Candidates, Scene
from alula.settings import Settings

_CHORD = 1e-5
"""how far below its chord a straight line may seem in single precision"""


class Criterion(Settings, abc.ABC):
    """By what a policy chooses the perceptual tokens that stay. Its fields are its settings; it keeps nothing else.

    Every criterion is a file of its own and a line in `criteria.Criteria`.
    """

    name: str
    """its name in saved settings"""
    is_of_images: ClassVar[bool] = False
    """whether it goes by places within one image"""
    merges: ClassVar[bool] = False
    """whether tokens that leave are merged into some that stay"""

    @property
    def reads_itself(self) -> bool:
        """Whether it reads attention of the layer in front of which it chooses."""
        return False

    @property
    def reads_before(self) -> bool:
        """Whether it reads attention in the layer before, so that it cannot choose in front of the first."""
        return False

    def place(self, stand: Stand, layer: int) -> None:
        """Ask ``stand`` for what is read before tokens are chosen in front of a layer.

        Raises:
            UsageError, HostError: the host has nothing that could be read.
        """

    @abc.abstractmethod
    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        """(U, N) bool: the candidates that stay, as many of every group as are wanted."""

    def into(self, candidates: Candidates) -> Tensor:
        """(U, N) whom each candidate joins, where it merges; those that stay themselves."""
        raise NotImplementedError


class Scored(Criterion):
    """A criterion by a score of every token: the highest stay, of equal ones those that come first."""

    @abc.abstractmethod
    def scores(self, scene: Scene, candidates: Candidates) -> Tensor:
        """(U, N) of the candidates."""

    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        return candidates.top(self.scores(scene, candidates).to(torch.float32))

    def choose_to_knee(self, scene: Scene, candidates: Candidates) -> Tensor:
        """(U, N) bool: the candidates that stay, down to the knee of the curve of their sorted scores."""
        return to_knee(self.scores(scene, candidates).to(torch.float32), candidates.real)


def to_knee(scores: Tensor, real: Tensor) -> Tensor:
    """(U, N) bool: of every group the largest (U, N) scores, down to the point of their sorted curve that is farthest
    below its chord, this one included; all where it is nowhere below: such scores have no long tail (2409.01162).

    Args:
        real: (U, N) bool: the candidate is there.
    """
    order = scores.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    curve, count = scores.gather(1, order), real.sum(dim=1, keepdim=True)
    last = curve.gather(1, (count - 1).clamp(min=0))
    height = (curve - last) / (curve[:, :1] - last).clamp(min=torch.finfo(scores.dtype).tiny)
    place = torch.arange(scores.shape[1], device=scores.device)
    below = (1 - place / (count - 1).clamp(min=1) - height).masked_fill(place >= count, -torch.inf)
    depth, knee = below.max(dim=1, keepdim=True)
    is_flat = (curve[:, :1] <= last) | (depth <= _CHORD)
    stays = place <= torch.where(is_flat, count, knee)
    return torch.zeros_like(stays).scatter(1, order, stays) & real


def named(value: Any) -> Any:
    """A setting given by its name alone as a mapping."""
    return {"name": value} if isinstance(value, str) else value
