"""What the study of the universal encoder leaves behind: a loss per caption; every figure is worked out from it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from alula.stats import Estimate, over_seeds
from studies.records import StudyRecord

Told = dict[str, dict[str, list[float]]]
"""medium -> "own" or "others" -> loss of each held-out caption behind that item"""


class UniversalRecord(StudyRecord):
    """The study's outcome, by training seed and arm."""

    format: Literal["alula-universal-1"] = "alula-universal-1"
    seeds: dict[int, dict[str, Told]]

    @property
    def media(self) -> list[str]:
        return list(next(iter(next(iter(self.seeds.values())).values())))

    @property
    def arms(self) -> list[str]:
        return list(next(iter(self.seeds.values())))

    def loss(self, arm: str, medium: str) -> Estimate:
        """Nats per token of captions behind their own item, over seeds and captions."""
        return over_seeds([self._losses(seed, arm, medium, "own") for seed in self.seeds])

    def seen(self, arm: str, medium: str) -> Estimate:
        """How much worse captions are told behind another's item: what the model has of the item."""
        return over_seeds([self._had(seed, arm, medium) for seed in self.seeds])

    def change(self, arm: str, other: str, medium: str | None = None) -> Estimate:
        """Loss behind the own item against another arm's, caption by caption; None: mean over media."""
        media = self.media if medium is None else [medium]
        return over_seeds(
            [
                np.mean([self._losses(s, arm, m, "own") - self._losses(s, other, m, "own") for m in media], axis=0)
                for s in self.seeds
            ]
        )

    def seen_change(self, arm: str, other: str, medium: str) -> Estimate:
        """What the model has of the item (`seen`) against another arm's, caption by caption."""
        return over_seeds([self._had(s, arm, medium) - self._had(s, other, medium) for s in self.seeds])

    def _had(self, seed: int, arm: str, medium: str) -> np.ndarray:
        return self._losses(seed, arm, medium, "others") - self._losses(seed, arm, medium, "own")

    def _losses(self, seed: int, arm: str, medium: str, item: str) -> np.ndarray:
        return np.asarray(self.seeds[seed][arm][medium][item], dtype=np.float64)
