"""The aim, fixed before any arm was trained, and which arms meet it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from alula.evaluation import across_seeds
from alula.evaluation.results import Estimate
from alula.reports.outcome import MethodOutcome
from studies.arms.contrasts import compare
from studies.frontier.record import FrontierOutcome

REFERENCE = "full"
BEHIND = 0.99
"""least share of the base's accuracy on text behind an image"""
SIGHT = -0.01
"""least difference of visual accuracy to full tuning"""
TIME = 1.1
"""most training time, as a multiple of full tuning's: what is called the same"""

AIMS = {
    "bare": "every answer to bare text is the base's own",
    "behind": "at least 99 % of the text behind an image is kept",
    "sight": "visual skill is at least that of full tuning less one point",
    "time": "training takes at most 1.1 times as long as full tuning",
}


@dataclass(frozen=True)
class Judgement:
    """One arm against the aim.

    Attributes:
        arm: its name.
        changed: answers to bare text that are not the base's, character for character, over all trainings.
        behind: share of the base's accuracy on text behind an image; None where the base had none.
        sight: visual accuracy minus full tuning's, paired by item and seed; None where that was not trained.
        time: training time as a multiple of full tuning's; None where it was not measured.
    """

    arm: str
    changed: int
    behind: Estimate | None
    sight: Estimate | None
    time: float | None

    @property
    def meets(self) -> dict[str, bool | None]:
        """Aim -> whether the estimate meets it; None where it is not known."""
        return {
            "bare": self.changed == 0,
            "behind": None if self.behind is None else self.behind.value >= BEHIND,
            "sight": None if self.sight is None else self.sight.value >= SIGHT,
            "time": None if self.time is None else self.time <= TIME,
        }

    @property
    def surely(self) -> dict[str, bool]:
        """The aims that are measured with an interval -> whether all of it meets them."""
        return {
            "behind": self.behind is not None and self.behind.low >= BEHIND,
            "sight": self.sight is not None and self.sight.low >= SIGHT,
        }


def judge(outcome: FrontierOutcome) -> list[Judgement]:
    """Every arm against the aim."""
    return [
        Judgement(
            name,
            changed=sum(result.overall.n - result.identical_answers for result in method.results("text_bare")),
            behind=_kept(method, "text_after_image"),
            sight=_sight(outcome.methods, method),
            time=relative_time(outcome, name),
        )
        for name, method in outcome.methods.items()
    ]


def relative_time(outcome: FrontierOutcome, arm: str) -> float | None:
    """Training time of an arm as a multiple of full tuning's: the median of rounds side by side."""
    if arm == REFERENCE:
        return 1.0
    found = outcome.costs.get(arm)
    return median(found) if found else None


def divergence(outcome: FrontierOutcome, arm: str) -> float:
    """KL(base || tuned) of an arm, mean over its trainings, in nats per answer token; NaN where it was not measured."""
    found = outcome.divergence.get(arm)
    return fmean(found.values()) if found else math.nan


def right_later(outcome: FrontierOutcome, arm: str) -> float:
    """Share of the visual questions answered right when they come a turn later than their images, mean over trainings;
    NaN where it was not measured."""
    found = outcome.later.get(arm)
    return fmean(found.values()) if found else math.nan


def _kept(method: MethodOutcome, task: str) -> Estimate | None:
    spread = across_seeds(method.results(task), by=()).overall.retention
    return None if spread is None else spread.mean


def _sight(methods: Mapping[str, MethodOutcome], method: MethodOutcome) -> Estimate | None:
    if REFERENCE not in methods:
        return None
    if method is methods[REFERENCE]:
        return Estimate(0.0, 0.0, 0.0)  # from itself it differs by nothing, whatever is asked
    return compare(methods[REFERENCE], method, "visual").difference.mean
