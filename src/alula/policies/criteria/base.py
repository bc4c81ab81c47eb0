"""The contract of a criterion: by what perceptual tokens are chosen that stay."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from alula.policies.base import Stand
from alula.policies.criteria.candidates import Candidates, Scene
from alula.settings import Settings


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

    def merge(self, scene: Scene, candidates: Candidates, stays: Tensor) -> Tensor:
        """(B, S, d) what the layer is given, where tokens that leave are merged into some that stay."""
        raise NotImplementedError


class Scored(Criterion):
    """A criterion by a score of every token: the highest stay, of equal ones those that come first."""

    @abc.abstractmethod
    def scores(self, scene: Scene, candidates: Candidates) -> Tensor:
        """(U, N) of the candidates."""

    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        return candidates.top(self.scores(scene, candidates).to(torch.float32))
