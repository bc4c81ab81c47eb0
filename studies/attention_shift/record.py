"""What the attention-shift study leaves behind; the report is drawn from it alone."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from alula.evaluation.results import Record
from alula.stats import PAIRED, Resampling
from studies.association import Association, Within, associate
from studies.attention_shift.measure import PRIMARY
from studies.records import StudyRecord

MAIN_TASK = "text_bare"
"""the paper speaks of text-only performance"""


class Measurement(Record):
    """One model.

    Attributes:
        accuracy: per task.
        shift: per variant of the measurement, mean attention shift; None where it is not defined.
        curves: of the primary variant: segment -> share of attention per layer.
    """

    accuracy: dict[str, float]
    shift: dict[str, float | None]
    curves: dict[str, list[float]]

    @classmethod
    def of(cls, measured: dict[str, Any]) -> Measurement:
        """From what `measure` wrote."""
        shift = {variant: value["value"] for variant, value in measured["shift"].items()}
        return cls(accuracy=measured["accuracy"], shift=shift, curves=measured["curves"])


class RunRecord(Record):
    """One training and its models by step."""

    seed: int
    text: float
    rate: float
    models: dict[int, Measurement]


class ShiftRecord(StudyRecord):
    """A whole study.

    Attributes:
        associations: variant of the shift -> task -> associations; the first is over all models as they are.
        skipped: runs left out of them because a shift is not defined for some model.
    """

    format: Literal["alula-attention-shift-1"] = "alula-attention-shift-1"
    bases: dict[int, Measurement]
    runs: list[RunRecord]
    skipped: list[str] = Field(default_factory=list)
    associations: dict[str, dict[str, list[Association]]] = Field(default_factory=dict)

    @property
    def whole(self) -> Association:
        """The study's question: primary shift against bare text accuracy, over all models."""
        return self.associations[PRIMARY][MAIN_TASK][0]


def associations(
    runs: list[RunRecord], how: Resampling = PAIRED
) -> tuple[dict[str, dict[str, list[Association]]], list[str]]:
    """Shift against accuracy for every variant and task, and the runs left out because a shift is not defined."""
    whole = [run for run in runs if all(None not in model.shift.values() for model in run.models.values())]
    skipped = [f"text {run.text:g}, rate {run.rate:g}, seed {run.seed}" for run in runs if run not in whole]
    if len(whole) < 3:
        return {}, skipped
    rates = [run.rate for run in whole]
    first = next(iter(whole[0].models.values()))
    found: dict[str, dict[str, list[Association]]] = {}
    for variant in first.shift:
        x = np.array([[model.shift[variant] for model in run.models.values()] for run in whole], dtype=float)
        for task in first.accuracy:
            y = np.array([[model.accuracy[task] for model in run.models.values()] for run in whole])
            found.setdefault(variant, {})[task] = [
                associate(x, y, within=within, strata=rates, how=how) for within in get_args(Within)
            ]
    return found, skipped
