"""Arm against arm on the same items and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alula.evaluation import SeedsComparison, across_seeds
from alula.evaluation.pairing import KIND
from alula.evaluation.results import Estimate, PairedResult
from alula.reports.outcome import MethodOutcome, Outcome
from alula.stats import Side
from studies.arms.ablation import Ablation, Column, Question


@dataclass(frozen=True)
class Contrast:
    """The answer to one question: per column, accuracy of the arm minus that of its reference, over seeds and items."""

    question: Question
    differences: dict[Column, Estimate]
    exact: dict[Column, Sequence[Side]]
    """which bounds of them are exact ones (`alula.evaluation.results.Comparison`)"""


def contrasts(ablation: Ablation, outcome: Outcome) -> list[Contrast]:
    """All questions whose two arms were trained."""
    found = []
    for question in ablation.questions:
        if {question.arm, question.against} <= outcome.methods.keys():
            arm, against = outcome.methods[question.arm], outcome.methods[question.against]
            compared = {column: compare(against, arm, column.task, column.kind) for column in ablation.columns}
            differences = {column: each.difference.mean for column, each in compared.items()}
            found.append(Contrast(question, differences, {column: each.exact for column, each in compared.items()}))
    return found


def compare(before: MethodOutcome, after: MethodOutcome, task: str, kind: str | None = None) -> SeedsComparison:
    """Two arms on one task (or on its text or visual items alone), paired item by item and seed by seed."""
    pairs = []
    for seed in sorted(before.seeds.keys() & after.seeds.keys()):
        first, second = before.seeds[seed].tasks[task], after.seeds[seed].tasks[task]
        pairs.append(_against(first, second))
    return across_seeds(pairs, by=()).overall if kind is None else across_seeds(pairs, by=KIND).groups[kind]


def _against(before: PairedResult, after: PairedResult) -> PairedResult:
    """Both were compared with the base on the same items: now with each other."""
    columns = after.columns.model_copy(update={"base": before.columns.tuned})
    return after.model_copy(update={"columns": columns})
