"""Associations in words, made from the numbers alone."""

from __future__ import annotations

import math
from typing import Literal

from alula.evaluation.results import Estimate
from alula.reports.wording import MISSING, probability
from studies.association import Association, Coefficient

Judgement = Literal["supported", "opposite", "open"]

WITHIN = {
    "all": "all models as they are",
    "run": "within one training, over its checkpoints",
    "step": "at equal steps, between trainings",
    "stratum": "at equal learning rates",
}

LEVEL = 0.05


def judge(association: Association, expected: Literal[-1, 1]) -> Judgement:
    """Whether a correlation of the expected sign is shown.

    It is where the interval of Pearson's coefficient excludes 0 on that side and its permutation p is below 5 %;
    "opposite" where that holds of the other side.
    """
    found = association.pearson
    if found is None or found.p is None or found.p >= LEVEL:
        return "open"
    if found.low > 0:
        sign = 1
    elif found.high < 0:
        sign = -1
    else:
        return "open"
    return "supported" if sign == expected else "opposite"


def coefficient(found: Coefficient | None) -> str:
    """``-0.62 (95 % interval -0.81 to -0.30, p = 0.004)``."""
    if found is None:
        return "not defined"
    chance = "no p" if found.p is None else p_value(found)
    return f"{found.value:+.2f} (95 % interval {interval(found)}, {chance})"


def p_value(found: Coefficient) -> str:
    """The p value; where permutations were drawn it cannot go below one in their number."""
    assert found.p is not None
    return probability(found.p) + (", exact" if found.exact else "")


def interval(found: Estimate) -> str:
    """``-0.81 to -0.30``."""
    low, high = (MISSING if math.isnan(bound) else f"{bound:+.2f}" for bound in (found.low, found.high))
    return f"{low} to {high}"


def numbers(association: Association) -> str:
    """``48 models of 12 trainings``."""
    if association.models == association.runs:
        return f"{association.models} models"
    return f"{association.models} models of {association.runs} trainings"
