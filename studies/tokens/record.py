"""What the study of tokenizers leaves behind, picture by picture; every figure is worked out from it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from alula.evaluation.results import Record
from alula.stats import CHANGE, SHARE, Estimate, over_seeds
from studies.records import StudyRecord

_SHARES = ("drawn", "coded")


class Measured(Record):
    """One trained arm, by held-out caption.

    Attributes:
        read: by how many nats its picture (or sound) makes a caption likelier than another's.
        drawn: whether the tower (the ears) finds that what was drawn shows what was asked, among eight (chance: one in
            eight).
        coded: the same of the true picture (sound) behind the tokenizer.
        pixels, pixels_coded: mean squared error of both, of pixels in [-1, 1]; none of sounds.
    """

    read: list[float]
    drawn: list[bool]
    coded: list[bool]
    pixels: list[float] = Field(default_factory=list)
    pixels_coded: list[float] = Field(default_factory=list)


class TokensRecord(StudyRecord):
    """The study's outcome, by training seed and arm."""

    format: Literal["alula-tokens-1"] = "alula-tokens-1"
    seeds: dict[int, dict[str, Measured]]

    @property
    def arms(self) -> list[str]:
        """In order."""
        return list(next(iter(self.seeds.values())))

    def mean(self, arm: str, what: str) -> Estimate:
        """Of a field of `Measured`, over seeds and captions."""
        return over_seeds([self._values(seed, arm, what) for seed in self.seeds], SHARE if what in _SHARES else None)

    def gain(self, arm: str, other: str, what: str) -> Estimate:
        """An arm less another, caption by caption."""
        found = [self._values(s, arm, what) - self._values(s, other, what) for s in self.seeds]
        return over_seeds(found, CHANGE if what in _SHARES else None)

    def likelier(self, arm: str) -> Estimate:
        """Share of the captions that their own picture makes likelier (chance: a half)."""
        return over_seeds([(self._values(seed, arm, "read") > 0).astype(np.float64) for seed in self.seeds], SHARE)

    def _values(self, seed: int, arm: str, what: str) -> np.ndarray:
        return np.asarray(getattr(self.seeds[seed][arm], what), dtype=np.float64)
