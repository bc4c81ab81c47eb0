"""The record of an experiment: several ways of tuning one base, each over seeds. Reports are drawn from it alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from alula.errors import EvaluationError
from alula.evaluation import RunResult, compare
from alula.evaluation.pairing import KEPT_FLIPS
from alula.evaluation.results import Conditions, PairedResult, Record
from alula.files import regular, unreadable

CURVE_POINTS = 200
"""points kept of a training curve: more than a figure can show"""


class CurvePoint(Record):
    """The training loss at an optimizer step of a stage."""

    stage: str
    step: int
    loss: float


class SeedOutcome(Record):
    """One training: its comparisons with the base by task name, and what it cost."""

    tasks: dict[str, PairedResult] = Field(min_length=1)
    curve: list[CurvePoint] = Field(default_factory=list)
    trainable_parameters: int | None = Field(default=None, ge=0)
    seconds: float | None = Field(default=None, ge=0)
    """training time, wall clock; these two are None where the training is not known"""
    conditions: Conditions

    @classmethod
    def of(
        cls,
        base: RunResult,
        tuned: RunResult,
        *,
        metrics: str | os.PathLike[str] | None = None,
        trainable_parameters: int | None = None,
        seconds: float | None = None,
        kept_flips: int = KEPT_FLIPS,
    ) -> Self:
        """Compare two runs and read the curve off a training's ``metrics.jsonl``.

        Reports show the flips of the first seed only: ``kept_flips=0`` keeps the files of the others small.
        """
        return cls(
            tasks=compare(base, tuned, kept_flips=kept_flips).tasks,
            curve=read_curve(metrics) if metrics is not None else [],
            trainable_parameters=trainable_parameters,
            seconds=seconds,
            conditions=tuned.conditions,
        )


class MethodOutcome(Record):
    """One way of tuning over seeds."""

    label: str
    description: str = ""
    learning_rates: dict[str, float] = Field(default_factory=dict)
    """per part, such as ``{"projector": 1e-3, "llm": 5e-4}``"""
    seeds: dict[int, SeedOutcome] = Field(min_length=1)

    def results(self, task: str) -> list[PairedResult]:
        """The comparisons of ``task``, one per seed in order; empty where no seed has it."""
        return [self.seeds[seed].tasks[task] for seed in sorted(self.seeds) if task in self.seeds[seed].tasks]


class BaseOutcome(Record):
    """The model everything is compared with."""

    label: str
    description: str = ""
    parameters: int | None = None


class Outcome(Record):
    """A whole experiment, as committed and as reports read it.

    Args:
        command: the line that repeats it.
        created: ISO 8601 time.
        environment: what else a reader needs to repeat it (versions, machine, commit), as texts.
        seconds: wall clock of the whole experiment.
        shared_curves: per seed, the curve of stages all methods share.
    """

    format: Literal["alula-outcome-1"] = "alula-outcome-1"
    title: str
    command: str
    created: str
    environment: dict[str, str]
    seconds: float = Field(ge=0)
    base: BaseOutcome
    shared_curves: dict[int, list[CurvePoint]] = Field(default_factory=dict)
    methods: dict[str, MethodOutcome] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_tasks(self) -> Self:
        first = next(iter(self.methods.values()))
        expected = set(next(iter(first.seeds.values())).tasks)
        for name, method in self.methods.items():
            for seed, outcome in method.seeds.items():
                if set(outcome.tasks) != expected:
                    difference = ", ".join(sorted(set(outcome.tasks) ^ expected))
                    raise ValueError(f"method {name!r}, seed {seed}: {difference} not answered by every training")
        return self

    @property
    def seeds(self) -> list[int]:
        """All training seeds, sorted."""
        return sorted({seed for method in self.methods.values() for seed in method.seeds})

    @property
    def tasks(self) -> dict[str, str]:
        """Task names and titles, in order."""
        first = next(iter(next(iter(self.methods.values())).seeds.values()))
        return {name: result.title for name, result in first.tasks.items()}


def read_curve(path: str | os.PathLike[str], points: int = CURVE_POINTS) -> list[CurvePoint]:
    """Return the loss curve of a ``metrics.jsonl``, thinned per stage to about ``points`` averages of equal stretches.

    Raises:
        EvaluationError: the file is missing, or a row lacks ``stage``, ``step`` or ``loss``.
    """
    try:
        lines = regular(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(error, path, EvaluationError) from error
    stages: dict[str, list[CurvePoint]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            point = CurvePoint(stage=row["stage"], step=row["step"], loss=row["loss"])
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError("is not a metrics row", where=f"{path}:{number}") from error
        stages.setdefault(point.stage, []).append(point)
    return [point for stage in stages.values() for point in _thin(rewound(stage), points)]


def rewound(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """A stage's curve without what was taken back: where steps begin again at an earlier one, the later rows count."""
    found: list[CurvePoint] = []
    for point in curve:
        while found and found[-1].step >= point.step:
            found.pop()
        found.append(point)
    return found


def _thin(curve: Sequence[CurvePoint], points: int) -> list[CurvePoint]:
    stretch = -(-len(curve) // points)
    return [
        CurvePoint(
            stage=curve[start].stage,
            step=curve[min(start + stretch, len(curve)) - 1].step,
            loss=sum(point.loss for point in curve[start : start + stretch]) / len(curve[start : start + stretch]),
        )
        for start in range(0, len(curve), stretch)
    ]
