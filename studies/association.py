"""Do two figures move together over a population of models whose members are not independent?

A population is runs x checkpoints. Checkpoints of one training resemble each other, so runs are what is resampled (for
intervals) and re-paired (for p values); a checkpoint more of the same runs is not counted as evidence more.

R runs, T checkpoints per run, N resamples or permutations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from alula.errors import UsageError
from alula.evaluation.results import Estimate, Record
from alula.stats import PAIRED, Resampling, percentile_interval

Within = Literal["all", "run", "step", "stratum"]
MOST_PERMUTATIONS = 50_000
"""up to so many re-pairings of runs are gone through one by one; of more, `Resampling.resamples` are drawn"""

_Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Coefficient(Estimate):
    """A correlation with its bootstrap interval over runs, and its two-sided permutation p over runs.

    Attributes:
        permutations: re-pairings behind ``p``; all there are where ``exact``.
    """

    p: float | None
    permutations: int
    exact: bool


class Association(Record):
    """How two figures move together.

    Attributes:
        within: "all": as they are; "run", "step", "stratum": deviations from the mean of the model's run, of all runs
            at that checkpoint, or of its stratum (runs trained alike in some respect), so that what differs between
            those counts for nothing.
        runs, models: how many there are of each.
        pearson, spearman: of values, and of ranks. None where they are not defined.
    """

    within: Within
    runs: int
    models: int
    pearson: Coefficient | None
    spearman: Coefficient | None


def associate(
    x: ArrayLike,
    y: ArrayLike,
    *,
    within: Within = "all",
    strata: Sequence[object] | None = None,
    how: Resampling = PAIRED,
) -> Association:
    """Correlate two figures over runs and checkpoints.

    Under the null hypothesis each run's ``y`` (all checkpoints together) might as well have been another run's; within
    "stratum", another run's of the same stratum. A trend that all runs share over training is part of the null: only
    what tells runs apart, or goes beyond the trend, can make p small.

    Args:
        x, y: (R, T), one row per run, one column per checkpoint.
        strata: per run a label; needed for ``within="stratum"``.

    Raises:
        UsageError: shapes that do not fit, undefined values, or no strata where they are needed.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 2 or x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UsageError(f"two full (runs, checkpoints) tables are needed, not {x.shape} and {y.shape}")
    if within not in get_args(Within):
        raise UsageError(f"within cannot be {within!r}", remedy=f"use one of: {', '.join(get_args(Within))}")
    if within == "stratum" and (strata is None or len(strata) != len(x)):
        raise UsageError("within='stratum' needs a label per run")
    labels = np.zeros(len(x), dtype=int)
    if within == "stratum" and strata is not None:
        labels = np.unique([str(label) for label in strata], return_inverse=True)[1]
    orders, exact = _orders(labels, how)
    draws = np.random.default_rng(how.seed).integers(len(x), size=(how.resamples, len(x)))
    found: dict[str, Coefficient | None] = {}
    for name, ranked in (("pearson", False), ("spearman", True)):
        value = float(_correlation(x, y, labels, within, ranked))
        if not math.isfinite(value):
            found[name] = None
            continue
        resampled = _correlation(x[draws], y[draws], labels[draws], within, ranked)
        null = np.abs(_correlation(x[None], y[orders], labels[None], within, ranked))
        reached = int((null >= abs(value) - 1e-12).sum())  # undefined ones have not reached it
        found[name] = Coefficient(
            **asdict(percentile_interval(value, resampled, how.confidence)),
            p=reached / len(orders) if exact else (1 + reached) / (1 + len(orders)),
            permutations=len(orders),
            exact=exact,
        )
    return Association(within=within, runs=len(x), models=x.size, **found)


def _correlation(x: _Array, y: _Array, labels: NDArray[np.intp], within: Within, ranked: bool) -> _Array:
    """(...) correlation of x and y (..., R, T) with strata labels (..., R); NaN where one of them does not vary."""
    x, y = (_residuals(values, labels, within) for values in (x, y))
    x, y = (values.reshape(*values.shape[:-2], -1) for values in (x, y))
    if ranked:
        x, y = (stats.rankdata(values, axis=-1) for values in (x, y))
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-12, (x * y).sum(axis=-1) / scale, np.nan)


def _residuals(values: _Array, labels: NDArray[np.intp], within: Within) -> _Array:
    if within == "run":
        centred = values - values.mean(axis=-1, keepdims=True)
    elif within == "step":
        centred = values - values.mean(axis=-2, keepdims=True)
    elif within == "stratum":
        same = (labels[..., :, None] == labels[..., None, :]).astype(float)
        means = same @ values.mean(axis=-1, keepdims=True) / same.sum(axis=-1, keepdims=True)
        centred = values - means
    else:
        return values
    # what rounding leaves of a figure that does not vary must not be ranked
    return np.where(np.abs(centred) < 1e-12, 0.0, centred)


def _orders(labels: NDArray[np.intp], how: Resampling) -> tuple[NDArray[np.intp], bool]:
    """(N, R) re-pairings of the runs within their strata, and whether they are all there are."""
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if math.prod(math.factorial(len(group)) for group in groups) <= MOST_PERMUTATIONS:
        return np.array(list(_all_orders(groups, len(labels)))), True
    rng = np.random.default_rng(how.seed + 1)
    orders = np.tile(np.arange(len(labels)), (how.resamples, 1))
    for group in groups:
        orders[:, group] = rng.permuted(orders[:, group], axis=1)
    return orders, False


def _all_orders(groups: Sequence[NDArray[np.intp]], count: int) -> Iterator[NDArray[np.intp]]:
    for chosen in itertools.product(*(itertools.permutations(group) for group in groups)):
        order = np.arange(count)
        for group, places in zip(groups, chosen, strict=True):
            order[group] = places
        yield order
