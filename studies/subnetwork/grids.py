"""Figures of the study as people read them."""

from __future__ import annotations

from alula.reports.wording import MISSING, bounds, percent, points
from alula.stats import Estimate

RULES = {
    "intersection": "kept by every task (alpha-SubNet)", "pooled": "one mask on all tasks' data, as sparse",
    "magnitude": "magnitude, as sparse", "random": "random, as sparse", "majority": "kept by more than half",
    "union": "kept by any task",
}  # fmt: skip
DEAD = 0.5
"""a skill of which less than this is kept is dead"""


def named(name: str, sparsity: float) -> str:
    """What a measurement at a sparsity is called."""
    return f"{name}-{100 * sparsity:g}"


def told(estimate: Estimate | None) -> str:
    """A difference in points, with its interval."""
    return MISSING if estimate is None else f"{points(estimate)} points ({bounds(estimate)})"


def share(estimate: Estimate) -> str:
    """A share with its interval."""
    return f"{percent(estimate.value)} ({bounds(estimate)})"


def clear(estimate: Estimate | None) -> bool:
    """Whether a difference is told from 0."""
    return estimate is not None and (estimate.low > 0 or estimate.high < 0)
