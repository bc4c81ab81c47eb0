"""What the alignment study leaves behind, and its five answers; the report is drawn from it alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import Field

from alula.evaluation.results import Record
from alula.stats import PAIRED, Resampling
from studies.alignment.measure import BEFORE, SITES
from studies.association import Association, Within, associate
from studies.records import StudyRecord
from studies.signs import SignTest, sign_test

PREDICTORS = ("score", "score_input_prompt", "contrast")
"""IMA score, same layer (the study's main one) and input prompt; and what a picture's own text adds"""
SKILLS = ("visual", "chair_recall")
HALLUCINATION = ("pope_accuracy", "pope_f1", "pope_accuracy, confusable", "chair_i", "chair_s")
_WITHIN: tuple[Within, ...] = ("all", "run", "step", "stratum")


class Measurement(Record):
    """One model: figures by name, and curves over states (layers + 1) or layers; None where not defined."""

    figures: dict[str, float | None]
    curves: dict[str, list[float | None]]


class RunRecord(Record):
    """One training: what it is, and its models by step; step 0 is before training."""

    seed: int
    configuration: str
    label: str
    models: dict[int, Measurement]

    @property
    def last(self) -> Measurement:
        """The trained model."""
        return self.models[max(self.models)]

    @property
    def trained(self) -> list[Measurement]:
        """The models of all milestones."""
        return [model for step, model in self.models.items() if step != BEFORE]


class Answers(Record):
    """What follows from the measurements. Tests are over trainings, as they are at their end; None: not defined.

    Attributes:
        differ: (a) per state, similarity within the kinds (mean of both) minus that between them.
        nearer: (a) that difference at the last state minus at the first.
        weights: (b) overlap of image and text weights minus "chance", "shared_magnitude" and "ceiling", mean over
            layers.
        inside: (c) site inside the block -> alignment there minus that of the block's input, mean over layers.
        inside_contrast: (c) the same of what a picture's own text adds.
        proxies: (d) and (e): predictor -> outcome -> associations over the trained models.
        between: (d) and (e): predictor -> outcome -> association over the configurations' means at the end.
        left_out: outcome -> trainings without a defined value.
    """

    differ: list[SignTest | None]
    nearer: SignTest | None
    weights: dict[str, SignTest | None]
    inside: dict[str, SignTest | None]
    inside_contrast: dict[str, SignTest | None]
    proxies: dict[str, dict[str, list[Association]]]
    between: dict[str, dict[str, Association]]
    left_out: dict[str, list[str]] = Field(default_factory=dict)


class AlignmentRecord(StudyRecord):
    """A whole study."""

    format: Literal["alula-alignment-1"] = "alula-alignment-1"
    runs: list[RunRecord]
    answers: Answers


def answer(runs: list[RunRecord], how: Resampling = PAIRED) -> Answers:
    """Work the five questions out from the measurements."""
    ends = [run.last.curves for run in runs]
    gaps = np.array([_gap(curves) for curves in ends])
    proxies: dict[str, dict[str, list[Association]]] = {}
    between: dict[str, dict[str, Association]] = {}
    left_out: dict[str, list[str]] = {}
    for outcome in (*SKILLS, *HALLUCINATION):
        whole = [run for run in runs if all(_all_defined(model, outcome) for model in run.trained)]
        if len(whole) < len(runs):
            left_out[outcome] = [f"{run.label}, seed {run.seed}" for run in runs if run not in whole]
        if len(whole) < 3:
            continue
        labels = [run.configuration for run in whole]
        for predictor in PREDICTORS:
            x, y = (_table(whole, name) for name in (predictor, outcome))
            found = [associate(x, y, within=within, strata=labels, how=how) for within in _WITHIN]
            proxies.setdefault(predictor, {})[outcome] = found
            means = [_means(values[:, -1], labels) for values in (x, y)]
            between.setdefault(predictor, {})[outcome] = associate(*means, how=how)
    return Answers(
        differ=[_test(gaps[:, state], how) for state in range(gaps.shape[1])],
        nearer=_test(gaps[:, -1] - gaps[:, 0], how),
        weights={
            other: _test([_mean(curves["iou"]) - _mean(curves[other]) for curves in ends], how)
            for other in ("chance", "shared_magnitude", "ceiling")
        },
        inside={site: _inside(ends, "aligned", site, how) for site in SITES if site != "stream"},
        inside_contrast={site: _inside(ends, "contrast", site, how) for site in SITES if site != "stream"},
        proxies=proxies,
        between=between,
        left_out=left_out,
    )


def _test(values: Iterable[float], how: Resampling) -> SignTest | None:
    defined = [float(value) for value in values if np.isfinite(value)]
    return sign_test(defined, how) if len(defined) > 1 else None


def _gap(curves: dict[str, list[float | None]]) -> np.ndarray:
    text, image, between = (np.array(curves[name], float) for name in ("within_text", "within_image", "between"))
    return (text + image) / 2 - between


def _inside(ends: list[dict[str, list[float | None]]], what: str, site: str, how: Resampling) -> SignTest | None:
    def rise(curves: dict[str, list[float | None]]) -> float:
        inner, stream = (np.array(curves[f"{what}/{name}"], float) for name in (site, "stream"))
        return float((inner - stream[: len(inner)]).mean())  # state l of the stream is what block l reads

    return _test([rise(curves) for curves in ends], how)


def _all_defined(model: Measurement, outcome: str) -> bool:
    return all(model.figures.get(name) is not None for name in (*PREDICTORS, outcome))


def _table(runs: list[RunRecord], name: str) -> np.ndarray:
    return np.array([[model.figures[name] for model in run.trained] for run in runs], dtype=float)


def _means(values: np.ndarray, labels: list[str]) -> np.ndarray:
    """(C, 1) means by label, in order of first appearance."""
    names = np.array(labels)
    return np.array([[values[names == label].mean()] for label in dict.fromkeys(labels)])


def _mean(values: list[float | None]) -> float:
    return float(np.mean(np.array(values, float)))
