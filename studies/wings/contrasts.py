"""Arm against arm on the same items and seeds."""

from __future__ import annotations

from dataclasses import dataclass

from alula.evaluation import SeedsComparison, across_seeds
from alula.evaluation.results import Estimate, PairedResult
from alula.reports.outcome import MethodOutcome, Outcome
from studies.wings.arms import QUESTIONS, Question


@dataclass(frozen=True)
class Contrast:
    """The answer to one question: per task, accuracy of the arm minus that of its reference, over seeds and items."""

    question: Question
    differences: dict[str, Estimate]


def contrasts(outcome: Outcome) -> list[Contrast]:
    """All questions whose two arms were trained."""
    found = []
    for question in QUESTIONS:
        if {question.arm, question.against} <= outcome.methods.keys():
            arm, against = outcome.methods[question.arm], outcome.methods[question.against]
            differences = {task: compare(against, arm, task).difference.mean for task in outcome.tasks}
            found.append(Contrast(question, differences))
    return found


def compare(before: MethodOutcome, after: MethodOutcome, task: str) -> SeedsComparison:
    """Two arms on one task, paired item by item and seed by seed."""
    pairs = []
    for seed in sorted(before.seeds.keys() & after.seeds.keys()):
        first, second = before.seeds[seed].tasks[task], after.seeds[seed].tasks[task]
        pairs.append(_against(first, second))
    return across_seeds(pairs).overall


def _against(before: PairedResult, after: PairedResult) -> PairedResult:
    """Both were compared with the base on the same items: now with each other."""
    columns = after.columns.model_copy(update={"base": before.columns.tuned})
    return after.model_copy(update={"columns": columns})
