"""The statistics of paired comparisons, as pure functions of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from alula.evaluation.results import Estimate
from alula.stats import Resampling

DEFAULT = Resampling(resamples=10_000)
"""of paired comparisons"""


def wilson(correct: float, n: int, confidence: float = 0.95) -> Estimate:
    """Return the proportion ``correct / n`` with Wilson's score interval (Wilson 1927), which behaves at 0 and 1.

    Args:
        correct: number of successes; may be fractional where items give part marks.
    """
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(value=share, low=float(max(0.0, centre - half)), high=float(min(1.0, centre + half)))


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p value that lost and gained items were equally likely (1 where nothing changed)."""
    changed = lost + gained
    return 1.0 if changed == 0 else float(stats.binomtest(min(lost, gained), changed, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values (family-wise error), in the given order."""
    count = len(p_values)
    adjusted = [0.0] * count
    running = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


@dataclass(frozen=True)
class Sums:
    """Scores of both models summed over items: per cluster, the units that are resampled, or per resample."""

    base: NDArray[np.float64]
    tuned: NDArray[np.float64]
    size: NDArray[np.float64]

    @classmethod
    def of(cls, base: ArrayLike, tuned: ArrayLike, cluster: ArrayLike | None = None) -> Sums:
        """Sum per-item scores, shape (items,), by cluster label; without labels each item stands alone."""
        base_n, tuned_n = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
        labels = np.arange(len(base_n)) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
        count = int(labels.max()) + 1

        def add(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.bincount(labels, weights=weights, minlength=count).astype(np.float64)

        return cls(base=add(base_n), tuned=add(tuned_n), size=add(np.ones_like(base_n)))


Statistic = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(sum of base scores, sum of tuned scores, number of items) -> value; elementwise over arrays of any one shape"""


def base_mean(base: NDArray[np.float64], tuned: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean score of the base."""
    return base / size


def tuned_mean(base: NDArray[np.float64], tuned: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean score of the tuned model."""
    return tuned / size


def difference(base: NDArray[np.float64], tuned: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tuned minus base mean score."""
    return (tuned - base) / size


def retention(base: NDArray[np.float64], tuned: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tuned over base mean score; infinite where a resample's base scores nothing and NaN where neither does."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuned / base


def resample(sums: Sums, how: Resampling = DEFAULT) -> Sums:
    """Return the totals of bootstrap resamples of the clusters, both models together; arrays of shape (resamples,)."""
    base, tuned, size = resample_totals(np.stack([sums.base, sums.tuned, sums.size], axis=1), how).T
    return Sums(base, tuned, size)


def resample_totals(rows: NDArray[np.float64], how: Resampling = DEFAULT) -> NDArray[np.float64]:
    """Return the totals (resamples, K) over bootstrap resamples of clusters that sum up to ``rows`` (clusters, K).

    Clusters with equal sums are interchangeable, so a resample is one draw from a multinomial over the distinct ones:
    the same distribution as drawing clusters one by one, at a cost that does not grow with their number.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    draws = np.random.default_rng(how.seed).multinomial(counts.sum(), counts / counts.sum(), size=how.resamples)
    return draws @ distinct


def bootstrap(sums: Sums, resampled: Sums, statistic: Statistic, confidence: float = 0.95) -> Estimate:
    """Return ``statistic`` of ``sums`` with the percentile interval of its values on ``resample(sums)``."""
    value = float(statistic(sums.base.sum(), sums.tuned.sum(), sums.size.sum()))
    return percentile_interval(value, statistic(resampled.base, resampled.tuned, resampled.size), confidence)


def standard_error(resampled: Sums, statistic: Statistic) -> float:
    """Return the bootstrap standard error of ``statistic``; resamples on which it is infinite are left out."""
    replicates = statistic(resampled.base, resampled.tuned, resampled.size)
    return float(np.std(replicates[np.isfinite(replicates)], ddof=1))


def percentile_interval(value: float, replicates: NDArray[np.float64], confidence: float) -> Estimate:
    """Return ``value`` with the percentile interval of its replicates; undefined (NaN) replicates are left out."""
    defined = np.sort(replicates[~np.isnan(replicates)])
    tail = (1 - confidence) / 2
    # an order statistic, not an interpolation: replicates of a ratio may be infinite
    low, high = (float(defined[round(q * (len(defined) - 1))]) for q in (tail, 1 - tail))
    return Estimate(value=value, low=low if np.isfinite(low) else None, high=high if np.isfinite(high) else None)


def seed_interval(values: Sequence[float], item_error: float, n_clusters: int, confidence: float = 0.95) -> Estimate:
    """Return the mean over training seeds with a t interval that carries both sources of chance.

    The variance of the mean is the between-seed variance over the number of seeds plus the squared standard error that
    comes from the choice of items; the degrees of freedom are Satterthwaite's (1946). With one seed only the items
    speak, and the interval says nothing about other trainings.

    Args:
        values: the statistic per seed.
        item_error: standard error over items of the seed-averaged statistic; 0 where every seed drew its own items,
            whose chance the spread between seeds then already holds.
        n_clusters: independent units behind ``item_error``.
    """
    count, mean = len(values), float(np.mean(values))
    seed_variance = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    item_variance = item_error**2
    total = seed_variance + item_variance
    if total == 0.0:
        return Estimate(value=mean, low=mean, high=mean)
    weights = seed_variance**2 / max(count - 1, 1) + item_variance**2 / max(n_clusters - 1, 1)
    half = float(stats.t.ppf(0.5 + confidence / 2, total**2 / weights)) * float(np.sqrt(total))
    return Estimate(value=mean, low=mean - half, high=mean + half)
