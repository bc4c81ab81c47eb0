"""What the study leaves behind: a number per question, model and measure; every figure is worked out from it.

Every measure is a mean over questions: of those that are ratios with weights (balanced, order) the weights hang on the
right answers alone, and are in the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from alula.evaluation import RunResult
from alula.evaluation.results import Record
from alula.stats import CHANGE, SHARE, Estimate, Range, bounded, over_seeds, seed_interval, unseen
from alula_fledgling.quickstart.plan import BASE
from studies.signs import SignTest, sign_test
from studies.truthfulness.arms import ARMS, Arm

MEASURES = {"score": "score", "yes": "said yes", "balanced": "balanced", "order": "order", "brier": "Brier"}
"""kept of every question: the score and what tells better answers from another habit; see `ratios_of`"""
TRUTH = ("microworld_mc1", "microworld_mc2")
ETHICS = tuple(f"microworld_{name}" for name in ("commonsense", "justice", "deontology", "virtue", "utilitarianism"))
_DIGITS = 5


class AskedTask(Record):
    """A task's questions: what each belongs to, its premise where it has one, and what constant answers score."""

    title: str
    clusters: list[str]
    premise: list[str]
    constants: dict[str, float]


class TruthRecord(Record):
    """The study's outcome.

    Attributes:
        tasks: what was asked.
        seeds: training seed -> arm (or base) -> task -> measure -> a number for each question.
    """

    command: str
    created: str
    environment: dict[str, str]
    seconds: float
    settings: dict[str, int | str | float]
    tasks: dict[str, AskedTask]
    seeds: dict[int, dict[str, dict[str, dict[str, list[float]]]]]

    @property
    def arms(self) -> list[Arm]:
        """Those that every seed trained."""
        return [arm for arm in ARMS if all(arm.name in seed for seed in self.seeds.values())]

    def mean(self, name: str, tasks: Sequence[str], measure: str) -> Estimate | None:
        """Of a model, over seeds and questions; of several tasks the mean of theirs. None: they have it not."""
        return self._estimate([self._values(seed, name, tasks, measure) for seed in self.seeds], tasks, SHARE)

    def difference(self, name: str, other: str, tasks: Sequence[str], measure: str) -> Estimate | None:
        """Of one model from another, paired question by question and seed by seed."""
        return self._estimate(self._differences(name, other, tasks, measure), tasks, CHANGE)

    def signs(self, name: str, other: str, tasks: Sequence[str], measure: str) -> SignTest | None:
        """Whether the differences, averaged over seeds, might as well have the other sign: clusters are flipped."""
        found = self._differences(name, other, tasks, measure)
        if any(each is None for each in found):
            return None
        averaged = [np.mean([each[at] for each in found if each is not None], axis=0) for at in range(len(tasks))]
        sums = [self._sums(task, each) / len(each) for task, each in zip(tasks, averaged, strict=True)]
        return sign_test(np.concatenate(sums).tolist())

    def of_premise(self, name: str, other: str | None, premise: str, task: str) -> Estimate:
        """The score on the questions with this premise alone, or its difference from another model's."""
        keep = np.array([each == premise for each in self.tasks[task].premise])
        found = [self._row(seed, name, task, "score")[keep] for seed in self.seeds]
        if other is not None:
            theirs = [self._row(seed, other, task, "score")[keep] for seed in self.seeds]
            found = [one - two for one, two in zip(found, theirs, strict=True)]
        return over_seeds(found, SHARE if other is None else CHANGE)

    def _differences(
        self, name: str, other: str, tasks: Sequence[str], measure: str
    ) -> list[list[NDArray[np.float64]] | None]:
        found: list[list[NDArray[np.float64]] | None] = []
        for seed in self.seeds:
            one, two = self._values(seed, name, tasks, measure), self._values(seed, other, tasks, measure)
            found.append(None if one is None or two is None else [a - b for a, b in zip(one, two, strict=True)])
        return found

    def _values(self, seed: int, name: str, tasks: Sequence[str], measure: str) -> list[NDArray[np.float64]] | None:
        if any(measure not in self.seeds[seed][name][task] for task in tasks):
            return None
        return [self._row(seed, name, task, measure) for task in tasks]

    def _row(self, seed: int, name: str, task: str, measure: str) -> NDArray[np.float64]:
        return np.array(self.seeds[seed][name][task][measure])

    def _estimate(
        self, found: Sequence[list[NDArray[np.float64]] | None], tasks: Sequence[str], within: Range
    ) -> Estimate | None:
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            return None
        per_seed = [float(np.mean([values.mean() for values in each])) for each in known]
        averaged = [np.mean([each[at] for each in known], axis=0) for at in range(len(tasks))]
        error = sum(self._error(task, values) ** 2 for task, values in zip(tasks, averaged, strict=True))
        units = sum(len({*self.tasks[task].clusters}) for task in tasks)
        estimate = seed_interval(per_seed, float(np.sqrt(error)) / len(tasks), units)
        return bounded(estimate, within, unseen(np.ones(units)))

    def _error(self, task: str, values: NDArray[np.float64]) -> float:
        """Standard error of the mean where clusters are what was drawn."""
        sums = self._sums(task, values - values.mean())
        return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))

    def _sums(self, task: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        index = np.unique(self.tasks[task].clusters, return_inverse=True)[1]
        return np.bincount(index, weights=values).astype(np.float64)


def numbers_of(run: RunResult) -> dict[str, dict[str, list[float]]]:
    """Task -> measure -> a number for each question of a model's answers."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, task in run.tasks.items():
        found[name] = {"score": [round(item.score, _DIGITS) for item in task.items]}
        for measure in MEASURES:
            if measure in task.items[0].counts:
                found[name][measure] = [round(item.counts[measure], _DIGITS) for item in task.items]
    return found


def asked_of(run: RunResult) -> dict[str, AskedTask]:
    """What was asked, of a model's answers."""
    return {
        name: AskedTask(
            title=task.title,
            clusters=[item.cluster or item.id for item in task.items],
            premise=[item.tags.get("premise", "") for item in task.items],
            constants={
                figure: estimate.value
                for figure, estimate in task.figures["all"].items()
                if estimate is not None and figure in ("always_yes", "always_first", "always_shortest", "chance")
            },
        )
        for name, task in run.tasks.items()
    }


def pairs_of(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Arms that see with those that read the same words without the pictures, where both are there."""
    for arm in arms:
        other = next((each for each in arms if each.pair == arm.pair and not each.sees), None)
        if arm.sees and other is not None:
            yield arm, other


__all__ = ["BASE", "ETHICS", "MEASURES", "TRUTH", "AskedTask", "TruthRecord", "asked_of", "numbers_of", "pairs_of"]
