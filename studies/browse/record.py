"""What the study of browsing leaves behind: a yes or no per question; every figure is worked out from it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from alula.evaluation.results import Record
from alula.stats import CHANGE, SHARE, Estimate, over_seeds
from studies.examples import Shown
from studies.records import StudyRecord


class Asked(Record):
    """One trained arm.

    Attributes:
        families: question -> "task: family".
        right: task -> what was told -> question -> whether it was answered right.
        moved: how far the condition moves image tokens, of their own size; None: there is none.
        shown: of each family about several pictures, a question with the answers by what was told.
        captions: of the two stages' arm behind its first, what was told -> nats per token of each caption.
    """

    families: dict[str, str]
    right: dict[str, dict[str, dict[str, bool]]]
    moved: float | None = None
    shown: tuple[Shown, ...] = ()
    captions: dict[str, list[float]] | None = None


class BrowseRecord(StudyRecord):
    """The study's outcome, by training seed and arm."""

    format: Literal["alula-browse-1"] = "alula-browse-1"
    seeds: dict[int, dict[str, Asked]]
    held: dict[int, float] = Field(default_factory=dict)
    """training seed -> how often an asked colour is read off a condition by a linear map"""

    @property
    def families(self) -> list[str]:
        """Of all questions, in order."""
        first = next(iter(next(iter(self.seeds.values())).values()))
        return list(dict.fromkeys(first.families.values()))

    def share(self, arm: str, told: str, group: str) -> Estimate:
        """Right answers to a task ("pictures") or a family ("pictures: change"), over seeds and questions."""
        return over_seeds([self._marks(seed, arm, told, group) for seed in self.seeds], SHARE)

    def gain(self, arm: str, told: str, group: str, *, over: tuple[str, str] = ("plain", "own")) -> Estimate:
        """Right answers less those of another arm, question by question."""
        pairs = ((self._marks(s, arm, told, group), self._marks(s, *over, group)) for s in self.seeds)
        return over_seeds([one - other for one, other in pairs], CHANGE)

    def moved(self, arm: str) -> float:
        """How far the condition moves image tokens, of their own size; mean over seeds."""
        found = [seed[arm].moved for seed in self.seeds.values()]
        return float(np.mean([each for each in found if each is not None]))

    def costs(self, told: str) -> Estimate:
        """What captions of what matters cost more, in nats per token, where another condition is told."""
        told_own = [seed["staged"].captions for seed in self.seeds.values()]
        pairs = [(each[told], each["own"]) for each in told_own if each is not None]
        return over_seeds([np.asarray(other) - np.asarray(own) for other, own in pairs])

    @property
    def captions(self) -> float:
        """What captions of what matters cost when told their own condition, in nats per token."""
        found = [seed["staged"].captions for seed in self.seeds.values()]
        return float(np.mean([np.mean(each["own"]) for each in found if each is not None]))

    def _marks(self, seed: int, arm: str, told: str, group: str) -> np.ndarray:
        asked, task = self.seeds[seed][arm], group.partition(":")[0]
        judged = asked.right[task][told]
        chosen = [right for item, right in judged.items() if group in (task, asked.families[item])]
        return np.asarray(chosen, dtype=np.float64)
