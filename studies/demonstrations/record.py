"""What the study of demonstrations leaves behind; every figure is worked out from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from alula.stats import CHANGE, SHARE, Estimate, over_seeds
from studies.examples import Shown
from studies.records import StudyRecord


class DemonstrationsRecord(StudyRecord):
    """The study's outcome.

    Attributes:
        seeds: training seed -> what `measure` found.
        shown: episodes with the first seed's answers, told in every way.
    """

    seeds: dict[int, dict[str, Any]]
    shown: tuple[Shown, ...] = ()

    @property
    def shots(self) -> list[int]:
        """The numbers of shots that were asked behind."""
        return [int(shots) for shots in self.settings["shots"]]

    @property
    def most_in_full(self) -> int:
        """The most that fit into the context with their pictures."""
        return max(shots for shots in self.shots if self.fits("full", shots))

    def fits(self, way: str, shots: int) -> bool:
        """Whether the prompts fitted into the context."""
        return all("right" in seed["ways"][way][str(shots)] for seed in self.seeds.values())

    def right(self, way: str, shots: int) -> Estimate:
        """The share of right answers, over seeds and episodes."""
        return over_seeds([self._items(seed, way, shots) for seed in self.seeds], SHARE)

    def lead(self, way: str, other: str, shots: int) -> Estimate:
        """How much more is right one way than the other, episode by episode."""
        return over_seeds([self._items(s, way, shots) - self._items(s, other, shots) for s in self.seeds], CHANGE)

    def mean(self, way: str, shots: int, name: str) -> float:
        """Of tokens, seconds or peak bytes over seeds."""
        return float(np.mean([seed["ways"][way][str(shots)][name] for seed in self.seeds.values()]))

    def ratio(self, way: str, shots: int, name: str) -> float:
        """Of a number to that of full demonstrations, within each seed's run."""
        pairs = [(seed["ways"][way][str(shots)], seed["ways"]["full"][str(shots)]) for seed in self.seeds.values()]
        return float(np.mean([own[name] / full[name] for own, full in pairs]))

    @property
    def encoding(self) -> float:
        """Seconds to encode one demonstration, over those of a question behind none."""
        found = [seed["encoding"] / seed["ways"]["full"][str(self.shots[0])]["seconds"] for seed in self.seeds.values()]
        return float(np.mean(found))

    def _items(self, seed: int, way: str, shots: int) -> np.ndarray:
        return np.asarray(self.seeds[seed]["ways"][way][str(shots)]["right"], dtype=np.float64)
