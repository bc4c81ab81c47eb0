"""What is said depends on intervals and nulls: the same model with other figures gets other sentences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alula.auditing import Audit, Finding, Plan, Status, findings
from alula.auditing.sections.attention import unrelated
from alula.auditing.sections.geometry import length_ratio
from alula.auditing.sections.overlap import shared_use
from alula.auditing.sections.text import BARE
from alula.evaluation import RatioComparison
from alula.evaluation.ratios import ALL
from alula.evaluation.references import REFERENCES
from alula.probes import Estimate


def finding(result: Audit, section: str) -> Finding:
    return next(found for found in findings(result) if found.section == section)


def put(result: Audit, **results: Any) -> Audit:
    """The audit with other results of the sections named."""
    return replace(result, results={**result.results, **results})


def with_shift(result: Audit, layers: int, value: float, half: float) -> Audit:
    shift = {"main": Estimate(value, value - half, value + half)}
    measured = result.results["attention"]
    before = {"before": [measured.curves["main"]["before"][0]] * layers}
    curves = {"main": {**measured.curves["main"], **before}}
    return put(result, attention=replace(measured, shift=shift, curves=curves))


@pytest.mark.parametrize(
    ("layers", "value", "half", "status"),
    [
        (32, 1.7, 0.1, Status.LOOK),
        (32, 1.7, 0.4, Status.OPEN),  # the interval reaches into what unrelated curves give
        (32, 0.4, 0.1, Status.FINE),
        (6, 1.7, 0.05, Status.OPEN),  # six layers can do that by chance
        (6, 0.1, 0.05, Status.FINE),
        (32, math.nan, 0.0, Status.OPEN),
    ],
)
def test_attention_shift(small: tuple[Plan, Audit], layers: int, value: float, half: float, status: Status) -> None:
    found = finding(with_shift(small[1], layers, value, half), "attention")
    assert found.status is status
    assert ("moves against" in found.says) == (status is Status.LOOK)


@pytest.mark.parametrize("layers", [4, 6, 12, 32])
def test_unrelated_is_the_critical_correlation(layers: int) -> None:
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((20_000, 2, layers))
    draws -= draws.mean(axis=-1, keepdims=True)
    r = (draws[:, 0] * draws[:, 1]).sum(-1) / np.sqrt((draws**2).sum(-1).prod(-1))
    assert (np.abs(r) > unrelated(layers)).mean() == pytest.approx(0.05, abs=0.006)


def with_contrast(result: Audit, own: Estimate, noise: Estimate) -> Audit:
    def moved(found: Any, estimate: Estimate) -> Any:
        pair = replace(found.pairs["image-text"], contrast_score=estimate, kept=64, samples=64)
        return replace(found, pairs={"image-text": pair})

    measured = result.results["alignment"]
    controls = {"noise": moved(measured.controls["noise"], noise)}
    return put(result, alignment=replace(measured, result=moved(measured.result, own), controls=controls))


def without_controls(result: Audit) -> Audit:
    return put(result, alignment=replace(result.results["alignment"], controls={}))


@pytest.mark.parametrize(
    ("own", "noise", "status"),
    [
        ((0.2, 0.15, 0.25), (0.0, -0.05, 0.05), Status.FINE),
        ((0.2, 0.15, 0.25), (0.15, 0.1, 0.2), Status.LOOK),
        ((0.02, -0.03, 0.07), (0.0, -0.05, 0.05), Status.ACT),
    ],
)
def test_alignment(small: tuple[Plan, Audit], own: Any, noise: Any, status: Status) -> None:
    found = finding(with_contrast(small[1], Estimate(*own), Estimate(*noise)), "alignment")
    assert found.status is status
    assert f"{own[0]:.2f} ({own[1]:.2f} to {own[2]:.2f})" in found.says


def test_alignment_without_its_control_is_open(small: tuple[Plan, Audit]) -> None:
    near, nowhere = Estimate(0.14, 0.05, 0.24), Estimate(0.0, -0.05, 0.04)
    measured = with_contrast(small[1], near, nowhere)
    assert finding(measured, "alignment").status is Status.FINE
    undefined = with_contrast(small[1], near, Estimate(math.nan, math.nan, math.nan))
    for unknown in (without_controls(measured), undefined):
        found = finding(unknown, "alignment")
        assert found.status is Status.OPEN
        assert "control" in found.says
        assert "--no-controls" in found.do
    lost = with_contrast(small[1], Estimate(0.02, -0.03, 0.07), nowhere)
    assert finding(without_controls(lost), "alignment").status is Status.ACT  # needs no control


def test_few_samples_decide_nothing(small: tuple[Plan, Audit]) -> None:
    measured = small[1].results["alignment"]
    pair = replace(measured.result.pairs["image-text"], kept=8, samples=8)
    few = put(small[1], alignment=replace(measured, result=replace(measured.result, pairs={"image-text": pair})))
    assert finding(few, "alignment").status is Status.OPEN


def with_text(
    result: Audit, *, lost: int, gained: int, n: int, low: float, identical: int, spread: float = 0.1
) -> Audit:
    task = result.results["text"].pairs.tasks[BARE]
    p = stats.binomtest(min(lost, gained), lost + gained, 0.5).pvalue if lost + gained else 1.0
    change = (gained - lost) / n
    overall = task.overall.model_copy(
        update={
            "n": n,
            "lost": lost,
            "gained": gained,
            "p_value": p,
            "difference": Estimate(value=change, low=change - spread, high=change + spread),
            "base": replace(task.overall.base, value=0.9),
            "retention": replace(task.overall.base, value=1 - (lost - gained) / n, low=low, high=1),
        }
    )
    pairs = result.results["text"].pairs.model_copy(
        update={"tasks": {BARE: task.model_copy(update={"overall": overall, "identical_answers": identical})}}
    )
    return put(result, text=replace(result.results["text"], pairs=pairs, after_image=None))


def test_text(small: tuple[Plan, Audit]) -> None:
    def status(**figures: Any) -> Status:
        return finding(with_text(small[1], **figures), "text").status

    assert status(lost=0, gained=0, n=100, low=1.0, identical=100) is Status.FINE
    # nothing lost among a hundred that were asked, yet other words: a loss of 3 % would often look like this
    assert status(lost=0, gained=0, n=100, low=0.025 ** (1 / 90), identical=60) is Status.OPEN
    assert status(lost=0, gained=0, n=1000, low=0.025 ** (1 / 900), identical=600) is Status.FINE
    assert status(lost=30, gained=5, n=100, low=0.6, identical=40) is Status.ACT
    assert status(lost=6, gained=5, n=100, low=0.95, identical=40) is Status.OPEN
    # eight turns of one dialogue: many items, but one broken thing, which the interval over dialogues knows
    assert status(lost=8, gained=0, n=100, low=0.7, identical=92, spread=0.2) is Status.OPEN


@pytest.mark.parametrize(
    ("identical", "change", "told", "expected"),
    [
        (100, None, "", Status.FINE),
        (99, None, "", Status.OPEN),  # nothing was weighed: a template that marks no answers
        (99, Estimate(0.002, -0.001, 0.005), "as likely as before, a token x 1.002 (0.999 to 1.005)", Status.FINE),
        (99, Estimate(-0.3, -0.5, -0.1), "more likely than before, a token x 0.741 (0.607 to 0.905)", Status.FINE),
        (99, Estimate(0.2, 0.1, 0.3), "less than before, a token x 1.221 (1.105 to 1.350)", Status.LOOK),
        (99, Estimate(0.2, -0.1, 0.3), "but not by 100 of them", Status.OPEN),
        # of a decoder that broke; e to the power of this is no number
        (99, Estimate(2000, 4, 3000), "less than before, a token x e^2000.0 (54.598 to e^3000.0)", Status.LOOK),
    ],
)
def test_answers_of_which_none_is_the_reference(
    identical: int, change: Estimate | None, told: str, expected: Status, small: tuple[Plan, Audit]
) -> None:
    """Chat models answer in sentences, right by no reference of one word: how likely they hold it tells."""
    audited = of_no_reference(small[1], identical, change)
    moved = finding(with_shift(audited, 32, 1.7, 0.1), "attention")
    assert ("cannot tell" in moved.do) == (expected is Status.OPEN)
    assert ("less likely" in moved.do) == (expected is Status.LOOK)
    found = finding(audited, "text")
    assert found.status is expected
    if identical == 100:
        assert "all 100 answers are the base's, character for character" in found.says
        return
    assert "1 of them are not the base's" in found.says
    assert told in found.says
    if change is None:
        assert "'Answer in one word.'" in found.do
    else:
        assert "2.00 nats per token of the references, after tuning 2.20" in found.against


def test_few_references_decide_nothing(small: tuple[Plan, Audit]) -> None:
    """Where one is resampled its interval has no width."""
    for change in (Estimate(0.2, 0.2, 0.2), Estimate(-0.1, -0.1, -0.1)):
        found = finding(of_no_reference(small[1], 99, change, units=9), "text")
        assert found.status is Status.OPEN
        assert "--items" in found.do
        assert finding(of_no_reference(small[1], 99, change, units=10), "text").status is not Status.OPEN


def of_no_reference(result: Audit, identical: int, change: Estimate | None, units: int = 100) -> Audit:
    told = with_text(result, lost=0, gained=0, n=100, low=1.0, identical=identical)
    task = told.results["text"].pairs.tasks[BARE]
    overall = task.overall.model_copy(
        update={"base": replace(task.overall.base, value=0.0, low=0.0, high=0.04), "retention": None}
    )
    nats = RatioComparison(base=Estimate(2, 1, 3), tuned=Estimate(2.2, 1, 3), difference=change)
    update = {
        "overall": overall,
        "figures": {} if change is None else {ALL: {REFERENCES.name: nats}},
        "columns": task.columns.model_copy(update={"cluster": [number % units for number in range(100)]}),
    }
    pairs = told.results["text"].pairs.model_copy(update={"tasks": {BARE: task.model_copy(update=update)}})
    return put(told, text=replace(told.results["text"], pairs=pairs))


def test_without_a_base_nothing_is_claimed(small: tuple[Plan, Audit]) -> None:
    text = replace(small[1].results["text"], pairs=None, after_image=None)
    alone = replace(put(small[1], text=text), base=None)
    found = finding(alone, "text")
    assert found.status is Status.OPEN
    assert "--base" in found.do


def test_length_ratio_is_as_wide_as_its_parts_allow() -> None:
    ratio = length_ratio(Estimate(8, 6, 10), Estimate(2, 1, 4))
    assert (ratio.value, ratio.low, ratio.high) == (4, 1.5, 10)


def test_shared_use_lies_between_null_and_ceiling(small: tuple[Plan, Audit]) -> None:
    result = small[1].results["overlap"]
    pair = result.pairs["image-text"]
    layers = tuple(
        replace(m, shared_magnitude=0.6, ceiling=1.0, iou=v) for m, v in zip(pair.layers, (0.7, 0.9), strict=True)
    )
    moved = replace(result, pairs={"image-text": replace(pair, layers=layers)})
    share = shared_use(moved, "image-text")
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.25, 0.75))
    assert finding(put(small[1], overlap=moved), "overlap").status is Status.LOOK
