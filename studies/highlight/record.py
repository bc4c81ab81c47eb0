"""What the study of highlights leaves behind: a number per item; every figure is worked out from it."""

from __future__ import annotations

import numpy as np

from alula.stats import CHANGE, SHARE, Estimate, Range, over_seeds
from studies.examples import Shown
from studies.highlight.plan import ARMS, Arm
from studies.records import StudyRecord


class HighlightRecord(StudyRecord):
    """The study's outcome.

    Attributes:
        seeds: training seed -> arm -> task -> measure -> a number for each item.
        shown: questions with the first seed's answers under some arms, the highlighted part framed.
    """

    seeds: dict[int, dict[str, dict[str, dict[str, list[float]]]]]
    shown: tuple[Shown, ...] = ()

    @property
    def arms(self) -> list[Arm]:
        """Those that every model was asked under."""
        return [arm for arm in ARMS if all(arm.name in seed for seed in self.seeds.values())]

    def mean(self, arm: Arm, task: str, measure: str) -> Estimate:
        """Over seeds and items."""
        return over_seeds([self._items(seed, arm, task, measure) for seed in self.seeds], _within(measure, SHARE))

    def gain(self, arm: Arm, task: str, measure: str) -> Estimate:
        """Over what the same models do without a highlight, item by item."""
        pairs = ((self._items(s, arm, task, measure), self._items(s, ARMS[0], task, measure)) for s in self.seeds)
        return over_seeds([own - plain for own, plain in pairs], _within(measure, CHANGE))

    def has(self, arm: Arm, task: str) -> bool:
        """Whether an arm was asked that."""
        return all(task in seed[arm.name] for seed in self.seeds.values())

    def _items(self, seed: int, arm: Arm, task: str, measure: str) -> np.ndarray:
        return np.asarray(self.seeds[seed][arm.name][task][measure], dtype=np.float64)


def _within(measure: str, shares: Range) -> Range | None:
    return None if measure == "nats" else shares
