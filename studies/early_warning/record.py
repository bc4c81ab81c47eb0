"""What the early-warning study leaves behind, and how its figures come about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, Field

from alula.evaluation.results import Estimate, Record
from alula.stats import PAIRED, Resampling, percentile_interval
from alula.training.retention import Measurement
from studies.association import Association, associate
from studies.ranking import Ranking, difference, rank, roc_area

PROBES = ("attention_shift", "attention_moved", "alignment", "alignment_contrast")
TEXT = ("text_lost", "text_loss")
"""text itself, measured early: items lost (1 - retention), and how much the loss of the reference answers rose"""
KNOWN = ("rate",)
"""what is known before the first step"""
SIGNALS = (*PROBES, *TEXT, *KNOWN)
LOOKS = (1, 2, 4, 8)
"""the looks at which every signal is judged, counted from 1: steps 10, 20, 40 and 80 of 240"""
MAIN = ("attention_shift", 2)
"""signal and look of the main figure, fixed before any training was watched"""


class Watched(Record):
    """One training.

    Attributes:
        rate, text, seed: learning rate, share of text among its samples, training seed.
        base, final: bare text accuracy before and after, over items the retention monitor does not see.
        steps: steps at which it was looked at.
        lost: 1 - retention at each look, by the retention monitor's own items.
        signals: name -> value at each look, the larger the more alarming; probes as the size of their change since the
            start; None where a probe was not defined.
        seconds, retention_seconds: wall clock of the training, and of the looks within it.
    """

    rate: float
    text: float
    seed: int
    base: float
    final: float
    steps: list[int]
    lost: list[float]
    signals: dict[str, list[float | None]]
    seconds: float
    retention_seconds: float = Field(validation_alias=AliasChoices("retention_seconds", "watch_seconds"))

    @property
    def retention(self) -> float:
        """Share of the base's accuracy that is left at the end."""
        return self.final / self.base

    @property
    def title(self) -> str:
        """What tells it apart."""
        return f"text {self.text:g}, rate {self.rate:g}, seed {self.seed}"

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], start: Measurement, *, rate: float, **about: Any) -> Watched:
        """From the metrics rows of a watched training and what was measured at its start.

        Args:
            rows: all rows of its one stage.
            start: `Measurement` at the start.
            rate: learning rate.
            about: the other attributes.
        """
        looks = [row for row in rows if "retention" in row]
        signals: dict[str, list[float | None]] = {
            "text_lost": [1 - row["retention"]["value"] for row in looks],
            "text_loss": [row["retention"]["loss"] - row["retention"]["loss_before"] for row in looks],
            "rate": [math.log10(rate)] * len(looks),
            "attention_moved": [row["probes"]["attention_moved"] for row in looks],
        }
        for name in PROBES:
            if name not in signals:
                signals[name] = [_change(row["probes"][name], start.probes[name]) for row in looks]
        return cls(
            rate=rate,
            steps=[row["step"] for row in looks],
            lost=[1 - row["retention"]["value"] for row in looks],
            signals={name: signals[name] for name in SIGNALS},
            seconds=rows[-1]["seconds"],
            retention_seconds=sum(row["retention_seconds"] for row in looks),
            **about,
        )


class Judged(Record):
    """A signal at one look.

    Attributes:
        look, step: which look, from 1, and its step.
        correlation: with the share of text accuracy lost at the end, over runs.
        at_equal_rates: the same, and the ranking, among runs of the same learning rate.
        ranking: of the runs that failed above those that held.
        beyond_text: area under the ROC curve minus that of `text_lost` at the same look.
    """

    look: int
    step: int
    runs: int
    correlation: Association | None
    correlation_at_equal_rates: Association | None
    ranking: Ranking | None
    ranking_at_equal_rates: Ranking | None
    beyond_text: Estimate | None


class Lead(Record):
    """How long before text breaks its budget a signal gives the alarm.

    The alarm of a run is the first look at which the signal is above everything it was in the *other* runs that held
    their budget to the end, at any look. So a threshold never sees the run it is tried on.

    Attributes:
        failed: runs whose own watched text fell below the budget and did not end above it.
        held: runs that ended within budget.
        warned: share of the failed runs whose alarm came before, or at the same look as, their break.
        early: share of the failed runs whose alarm came at an earlier look.
        steps: mean number of steps from alarm to break over failed runs with an alarm by then; None without any.
        false: share of the runs that held and still gave an alarm.
    """

    failed: int
    held: int
    warned: Estimate | None
    early: Estimate | None
    steps: Estimate | None
    false: Estimate | None


class WarningRecord(Record):
    """A whole study; the report is drawn from it alone.

    Attributes:
        judged: signal -> one entry per look of `LOOKS`.
        areas: signal -> area under the ROC curve at every look, for the figure.
        leads: by signal (the learning rate cannot give an alarm in time: it is there from the start).
    """

    format: Literal["alula-early-warning-1"] = "alula-early-warning-1"
    command: str
    created: str
    environment: dict[str, str]
    settings: dict[str, Any]
    budget: float
    runs: list[Watched]
    judged: dict[str, list[Judged]]
    areas: dict[str, list[float | None]]
    leads: dict[str, Lead]

    @property
    def failed(self) -> int:
        """Trainings that ended below the budget."""
        return sum(run.retention < self.budget for run in self.runs)

    @property
    def main(self) -> Judged | None:
        """The study's question."""
        signal, look = MAIN
        return next((one for one in self.judged[signal] if one.look == look), None)


def judge_all(
    runs: Sequence[Watched], budget: float, how: Resampling = PAIRED
) -> tuple[dict[str, list[Judged]], dict[str, list[float | None]], dict[str, Lead]]:
    """Return what `WarningRecord` holds of these runs: signals judged, areas at every look, leads."""
    looks = min(len(run.steps) for run in runs)
    judged = {
        signal: [judge_signal(runs, signal, look, budget, how) for look in LOOKS if look <= looks] for signal in SIGNALS
    }
    areas = {signal: [_area(runs, signal, look, budget) for look in range(1, looks + 1)] for signal in SIGNALS}
    leads = {signal: lead(runs, signal, budget, how) for signal in (*PROBES, *TEXT)}
    return judged, areas, leads


def judge_signal(runs: Sequence[Watched], signal: str, look: int, budget: float, how: Resampling = PAIRED) -> Judged:
    """Judge one signal at one look against what became of the runs; runs in which it is not defined are left out."""
    known = [run for run in runs if run.signals[signal][look - 1] is not None]
    x = np.array([run.signals[signal][look - 1] for run in known], dtype=float)
    text = np.array([run.signals["text_lost"][look - 1] for run in known], dtype=float)
    ends = np.array([1 - run.retention for run in known])
    failed = np.array([run.retention < budget for run in known], dtype=bool)
    rates = [run.rate for run in known]
    enough = len(known) >= 3
    related = [
        associate(x[:, None], ends[:, None], within=within, strata=rates, how=how) if enough else None
        for within in ("all", "stratum")
    ]
    return Judged(
        look=look,
        step=runs[0].steps[look - 1],
        runs=len(known),
        correlation=related[0],
        correlation_at_equal_rates=related[1],
        ranking=rank(x, failed, how=how) if enough else None,
        ranking_at_equal_rates=rank(x, failed, strata=rates, how=how) if enough else None,
        beyond_text=difference(x, text, failed, how) if enough and signal != "text_lost" else None,
    )


def lead(runs: Sequence[Watched], signal: str, budget: float, how: Resampling = PAIRED) -> Lead:
    """Return how long before the break a signal warns; see `Lead`."""
    held = [run.retention >= budget for run in runs]
    most = [max((value for value in run.signals[signal] if value is not None), default=-math.inf) for run in runs]
    warned, early, steps, false = [], [], [], []
    for number, run in enumerate(runs):
        others = [most[other] for other in range(len(runs)) if held[other] and other != number]
        if not others:
            continue
        alarm = _first(run, [value is not None and value > max(others) for value in run.signals[signal]])
        broken = _first(run, [value > 1 - budget for value in run.lost])
        if held[number]:
            false.append(float(alarm is not None))
        elif broken is not None:
            warned.append(float(alarm is not None and alarm <= broken))
            early.append(float(alarm is not None and alarm < broken))
            if alarm is not None and alarm <= broken:
                steps.append(float(broken - alarm))
    return Lead(
        failed=len(warned),
        held=len(false),
        warned=_mean(warned, how),
        early=_mean(early, how),
        steps=_mean(steps, how),
        false=_mean(false, how),
    )


def _first(run: Watched, there: Sequence[bool]) -> int | None:
    """The step of the first look at which something was there."""
    return next((step for step, found in zip(run.steps, there, strict=True) if found), None)


def _mean(values: Sequence[float], how: Resampling) -> Estimate | None:
    """A mean over runs with its bootstrap interval."""
    if not values:
        return None
    found: NDArray[np.float64] = np.array(values)
    draws = np.random.default_rng(how.seed).integers(len(found), size=(how.resamples, len(found)))
    return percentile_interval(float(found.mean()), found[draws].mean(axis=1), how.confidence)


def _area(runs: Sequence[Watched], signal: str, look: int, budget: float) -> float | None:
    known = [run for run in runs if run.signals[signal][look - 1] is not None]
    if not known:
        return None
    values = np.array([run.signals[signal][look - 1] for run in known], dtype=float)
    return roc_area(values, [run.retention < budget for run in known])


def _change(now: float | None, then: float | None) -> float | None:
    return None if now is None or then is None else abs(now - then)
