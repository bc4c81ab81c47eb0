"""Does a figure put the runs that fail above those that do not? Areas under the ROC and precision-recall curves.

R runs, of which some failed; N resamples or permutations. Runs are the independent units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alula.errors import UsageError
from alula.evaluation.results import Estimate, Record
from alula.stats import PAIRED, Resampling, percentile_interval
from studies.association import MOST_PERMUTATIONS

_Array = NDArray[np.float64]
_Measure = Callable[[_Array, NDArray[np.bool_], NDArray[np.intp]], _Array]
"""(N, R) figures, outcomes and strata -> (N,) areas, NaN where they are not defined"""
_BLOCK = 1000
"""rows of resamples held at a time: pairs of runs take N x R x R numbers"""


@dataclass(frozen=True, kw_only=True)
class Area(Estimate):
    """An area with its bootstrap interval over runs (those without a failure, or without a run that held, left out).

    Attributes:
        p: one-sided permutation p: the share of ways to say which runs failed that give an area at least as large.
        permutations: ways behind ``p``; all there are where ``exact``.
    """

    p: float
    permutations: int
    exact: bool


class Ranking(Record):
    """How well a figure ranks runs.

    Attributes:
        runs, failed: how many there are, and how many of them failed.
        auc: chance that a failed run has the larger figure of a pair, ties counting half; chance level 0.5. With
            strata, of pairs within a stratum.
        precision: average precision, the area under the precision-recall curve; chance level ``failed / runs``. None
            with strata.
    """

    runs: int
    failed: int
    auc: Area | None
    precision: Area | None


def rank(
    figure: ArrayLike, failed: ArrayLike, *, strata: Sequence[object] | None = None, how: Resampling = PAIRED
) -> Ranking:
    """Rank runs by a figure, the larger the more alarming.

    Args:
        figure: (R,) defined values.
        failed: (R,) whether the run failed.
        strata: per run a label; only pairs of one label are compared, and labels of failure permuted within it.

    Raises:
        UsageError: shapes that differ, or undefined values.
    """
    x, y = np.asarray(figure, dtype=float), np.asarray(failed, dtype=bool)
    if x.ndim != 1 or x.shape != y.shape or not np.isfinite(x).all():
        raise UsageError(f"a defined figure per run is needed, not {x.shape} with {y.shape} outcomes")
    labels = np.zeros(len(x), dtype=int)
    if strata is not None:
        labels = np.unique([str(label) for label in strata], return_inverse=True)[1]
    outcomes, exact = _outcomes(y, labels, how)
    draws = np.random.default_rng(how.seed).integers(len(x), size=(how.resamples, len(x)))

    def area(measure: _Measure) -> Area | None:
        value = float(measure(x[None], y[None], labels[None])[0])
        if not math.isfinite(value):
            return None
        null = measure(np.broadcast_to(x, outcomes.shape), outcomes, np.broadcast_to(labels, outcomes.shape))
        reached = int((null >= value - 1e-12).sum())
        return Area(
            **asdict(percentile_interval(value, measure(x[draws], y[draws], labels[draws]), how.confidence)),
            p=reached / len(outcomes) if exact else (1 + reached) / (1 + len(outcomes)),
            permutations=len(outcomes),
            exact=exact,
        )

    return Ranking(
        runs=len(x),
        failed=int(y.sum()),
        auc=area(_auc),
        precision=area(_average_precision) if strata is None else None,
    )


def roc_area(figure: ArrayLike, failed: ArrayLike) -> float | None:
    """Return the area under the ROC curve alone, as in `rank`; None where no run failed, or all did."""
    x, y = np.asarray(figure, dtype=float), np.asarray(failed, dtype=bool)
    value = float(_auc(x[None], y[None], np.zeros((1, len(x)), dtype=int))[0])
    return value if math.isfinite(value) else None


def difference(one: ArrayLike, other: ArrayLike, failed: ArrayLike, how: Resampling = PAIRED) -> Estimate | None:
    """Return the area under the ROC curve of ``one`` minus that of ``other`` on the same runs, resampled together."""
    x, z, y = np.asarray(one, dtype=float), np.asarray(other, dtype=float), np.asarray(failed, dtype=bool)
    draws = np.concatenate(
        [np.arange(len(y))[None], np.random.default_rng(how.seed).integers(len(y), size=(how.resamples, len(y)))]
    )
    same = np.zeros_like(draws)
    values = _auc(x[draws], y[draws], same) - _auc(z[draws], y[draws], same)
    return percentile_interval(float(values[0]), values[1:], how.confidence) if np.isfinite(values[0]) else None


def _in_blocks(measure: _Measure) -> _Measure:
    def whole(x: _Array, y: NDArray[np.bool_], labels: NDArray[np.intp]) -> _Array:
        parts = (slice(start, start + _BLOCK) for start in range(0, len(x), _BLOCK))
        return np.concatenate([measure(x[part], y[part], labels[part]) for part in parts])

    return whole


@_in_blocks
def _auc(x: _Array, y: NDArray[np.bool_], labels: NDArray[np.intp]) -> _Array:
    better = (x[:, :, None] > x[:, None, :]) + 0.5 * (x[:, :, None] == x[:, None, :])
    pairs = y[:, :, None] & ~y[:, None, :] & (labels[:, :, None] == labels[:, None, :])
    with np.errstate(invalid="ignore"):
        return (better * pairs).sum(axis=(1, 2)) / pairs.sum(axis=(1, 2))


@_in_blocks
def _average_precision(x: _Array, y: NDArray[np.bool_], labels: NDArray[np.intp]) -> _Array:
    # precision at each failed run: of the runs with a figure at least as large, the share that failed
    reached = x[:, None, :] >= x[:, :, None]
    precision = (reached & y[:, None, :]).sum(axis=2) / reached.sum(axis=2)
    with np.errstate(invalid="ignore"):
        found = (precision * y).sum(axis=1) / y.sum(axis=1)
    return np.where(y.all(axis=1), np.nan, found)


def _outcomes(y: NDArray[np.bool_], labels: NDArray[np.intp], how: Resampling) -> tuple[NDArray[np.bool_], bool]:
    """(N, R) ways to say which runs failed, as many in each stratum as did, and whether they are all there are."""
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    counts = [int(y[group].sum()) for group in groups]
    if (
        math.prod(math.comb(len(group), count) for group, count in zip(groups, counts, strict=True))
        <= MOST_PERMUTATIONS
    ):
        chosen = itertools.product(*(itertools.combinations(g, c) for g, c in zip(groups, counts, strict=True)))
        found = []
        for parts in chosen:
            outcome = np.zeros(len(y), dtype=bool)
            outcome[[run for part in parts for run in part]] = True
            found.append(outcome)
        return np.array(found), True
    rng = np.random.default_rng(how.seed + 1)
    shuffled = np.tile(y, (how.resamples, 1))
    for group in groups:
        shuffled[:, group] = rng.permuted(shuffled[:, group], axis=1)
    return shuffled, False
