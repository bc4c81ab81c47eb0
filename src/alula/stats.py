"""Statistics: numbers with intervals, how the intervals are made, and tests of paired comparisons.

R resamples, K kept samples, N samples seen in all, L layers or states.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, Field
from scipy import stats

from alula.settings import Int, Number, Settings

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Base of all results."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values; undefined numbers (NaN, infinities) become None."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


Bound = Annotated[float, BeforeValidator(lambda bound: math.nan if bound is None else bound)]
"""A bound of an interval; JSON knows no NaN and has null in its place."""


@dataclass(frozen=True)
class Estimate(Result):
    """A number with an interval; a bound is NaN where none can be given, as of a ratio whose base may be 0."""

    value: float
    low: Bound = math.nan
    high: Bound = math.nan


Curve = tuple[Estimate, ...]
"""One estimate per layer or state."""


class Resampling(Settings):
    """How intervals are made.

    Attributes:
        confidence: of the percentile interval.
        resamples: number of bootstrap resamples.
        permutations: number of random re-pairings behind each permutation null.
        seed: of all draws.
    """

    confidence: Number = Field(default=0.95, gt=0, lt=1)
    resamples: Int = Field(default=1000, ge=1)
    permutations: Int = Field(default=200, ge=1)
    seed: Int = Field(default=0, ge=0)

    def weights(self, kept: int, seen: int) -> Array:
        """(1 + R, K) share of each kept sample in resamples of size N; rows add to 1, and the first is the kept
        sample.

        Drawing N (not K) from the kept ones makes intervals as narrow as N samples deserve, with the spread estimated
        from K of them.
        """
        draws = np.random.default_rng(self.seed).multinomial(seen, np.full(kept, 1 / kept), size=self.resamples)
        return np.concatenate([np.full((1, kept), 1 / kept), draws / seen])

    def shuffles(self, kept: int) -> np.ndarray:
        """(P, K) random permutations of the kept samples."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.permuted(np.tile(np.arange(kept), (self.permutations, 1)), axis=1)

    def estimate(self, replicates: Array, value: float | None = None) -> Estimate:
        """A statistic with its percentile interval.

        Args:
            replicates: (1 + R,) the statistic under each row of `weights`; undefined ones are left out.
            value: the statistic over all samples seen, about which the interval is placed; that of the kept ones when
                None.
        """
        value = float(replicates[0]) if value is None else float(value)
        defined = replicates[1:][np.isfinite(replicates[1:])]
        if not (math.isfinite(value) and math.isfinite(replicates[0])) or len(defined) < 2:
            return Estimate(value)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [tail, 1 - tail]) + (value - replicates[0])
        return Estimate(value, float(low), float(high))

    def curve(self, replicates: Array, values: Array | None = None) -> Curve:
        """Estimates for replicates (1 + R, L) with values (L,)."""
        return tuple(
            self.estimate(replicates[:, i], None if values is None else values[i]) for i in range(replicates.shape[1])
        )


DEFAULT = Resampling()
PAIRED = Resampling(resamples=10_000)
"""of paired comparisons"""
_FEW = 256
"""distinct rows whose resampled totals are remembered: of more of them the key is as large as what it saves"""


def means(weights: Array, entries: Array) -> Array:
    """(R, ...) weighted means of entries (K, ...)."""
    return np.tensordot(weights, entries, axes=1)


def weighted(weights: Array, values: Array) -> Array:
    """(R,) weighted means of values (K,), of which the undefined ones are left out."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights @ np.where(defined, values, 0) / (weights @ defined)


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

    base: Array
    tuned: Array
    size: Array

    @classmethod
    def of(cls, base: ArrayLike, tuned: ArrayLike, cluster: ArrayLike | None = None) -> Sums:
        """Sum per-item scores, shape (items,), by cluster label; without labels each item stands alone."""
        base_n, tuned_n = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
        labels = np.arange(len(base_n)) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
        count = int(labels.max()) + 1

        def add(weights: Array) -> Array:
            return np.bincount(labels, weights=weights, minlength=count).astype(np.float64)

        return cls(base=add(base_n), tuned=add(tuned_n), size=add(np.ones_like(base_n)))


Statistic = Callable[[Array, Array, Array], Array]
"""(sum of base scores, sum of tuned scores, number of items) -> value; elementwise over arrays of any one shape"""


def base_mean(base: Array, tuned: Array, size: Array) -> Array:
    """Mean score of the base."""
    return base / size


def tuned_mean(base: Array, tuned: Array, size: Array) -> Array:
    """Mean score of the tuned model."""
    return tuned / size


def difference(base: Array, tuned: Array, size: Array) -> Array:
    """Tuned minus base mean score."""
    return (tuned - base) / size


def retention(base: Array, tuned: Array, size: Array) -> Array:
    """Tuned over base mean score; infinite where a resample's base scores nothing and NaN where neither does."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuned / base


def resample(sums: Sums, how: Resampling = PAIRED) -> Sums:
    """Return the totals of bootstrap resamples of the clusters, both models together; arrays of shape (resamples,)."""
    base, tuned, size = resample_totals(np.stack([sums.base, sums.tuned, sums.size], axis=1), how).T
    return Sums(base, tuned, size)


def resample_totals(rows: Array, how: Resampling = PAIRED) -> Array:
    """Return the totals (resamples, K) over bootstrap resamples of clusters that sum up to ``rows`` (clusters, K).

    Clusters with equal sums are interchangeable, so a resample is one draw from a multinomial over the distinct ones:
    the same distribution as drawing clusters one by one, at a cost that does not grow with their number.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    if len(distinct) > _FEW:
        return _drawn(distinct, counts, how)
    return _remembered(distinct.tobytes(), distinct.dtype.str, tuple(map(int, counts)), how)


@functools.lru_cache(maxsize=512)  # tables, figures and sentences of a report ask about the same comparisons
def _remembered(distinct: bytes, dtype: str, counts: tuple[int, ...], how: Resampling) -> Array:
    """`_drawn`, to be read alone."""
    totals = _drawn(np.frombuffer(distinct, dtype).reshape(len(counts), -1), np.array(counts), how)
    totals.setflags(write=False)
    return totals


def _drawn(distinct: Array, counts: NDArray[Any], how: Resampling) -> Array:
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


def unseen(weights: ArrayLike, confidence: float = 0.95) -> float:
    """Return the upper bound of a share of which nothing was seen, where a bootstrap has nothing to vary.

    It is the upper end of the exact two-sided binomial interval (Clopper and Pearson 1934) for none of so many units.
    Units that weigh differently count as (sum w)^2 / sum w^2 equal ones (Kish 1965), an effective sample size in the
    exact interval as in Korn and Graubard (1998), with all of a cluster taken to move together.

    Args:
        weights: of the independent units, such as the items of each cluster.
    """
    given = np.asarray(weights, dtype=float)
    squares = float(np.square(given).sum())
    if squares == 0.0:
        return 1.0
    return 1.0 - float(((1 - confidence) / 2) ** (squares / given.sum() ** 2))


Side = Literal["low", "high"]


@dataclass(frozen=True)
class Unmoved:
    """What a paired comparison did not see: how far it may reach beyond what resampling says, per side.

    Attributes:
        low: nothing fell: bounds of the shares of items, and of the base's score, that may have. None where some did.
        high: nothing rose: likewise.
    """

    low: tuple[float, float] | None
    high: tuple[float, float] | None

    @classmethod
    def of(cls, sums: Sums, *, fell: bool, rose: bool, confidence: float) -> Unmoved:
        """Of the sums of clusters; whether any item's score fell, and rose."""
        items, scored = unseen(sums.size, confidence), unseen(sums.base, confidence)
        mean = float(sums.base.sum() / sums.size.sum())
        return cls(
            low=None if fell else (items, scored),
            high=None if rose else (items, items / mean if mean else math.inf),
        )

    @property
    def sides(self) -> tuple[Side, ...]:
        """On which nothing was seen."""
        sides: tuple[Side, ...] = ("low", "high")
        return tuple(side for side in sides if getattr(self, side) is not None)

    def difference(self, found: Estimate) -> Estimate:
        """The interval of a difference of mean scores with it."""
        return self._widened(found, 0, -1.0, 1.0)

    def retention(self, found: Estimate) -> Estimate:
        """The interval of a ratio of mean scores with it."""
        return self._widened(found, 1, 0.0, math.inf)

    def _widened(self, found: Estimate, which: int, least: float, most: float) -> Estimate:
        """Losses and gains have a distance to their bound each; squared ones add (MOVER, Zou and Donner 2008)."""
        low, high = found.low, found.high
        if self.low is not None:
            low = found.value - math.hypot(found.value - found.low, self.low[which])
        if self.high is not None:
            high = found.value + math.hypot(found.high - found.value, self.high[which])
        bounds = (math.nan if math.isnan(bound) else min(max(bound, least), most) for bound in (low, high))
        return Estimate(found.value, *bounds)


def percentile_interval(value: float, replicates: Array, confidence: float) -> Estimate:
    """Return ``value`` with the percentile interval of its replicates; undefined (NaN) replicates are left out."""
    defined = np.sort(replicates[~np.isnan(replicates)])
    tail = (1 - confidence) / 2
    # an order statistic, not an interpolation: replicates of a ratio may be infinite
    low, high = (float(defined[round(q * (len(defined) - 1))]) for q in (tail, 1 - tail))
    return Estimate(value, *(bound if math.isfinite(bound) else math.nan for bound in (low, high)))


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


Range = tuple[float, float]
"""Least and largest value that something can take."""
SHARE: Range = (0.0, 1.0)
"""of a share, such as of right answers"""
CHANGE: Range = (-1.0, 1.0)
"""of a difference of shares"""


def bounded(found: Estimate, within: Range, beyond: float) -> Estimate:
    """Return an estimate whose interval stays within what its value can be, and has a width where nothing was seen.

    A t interval and a bootstrap know nothing of the range a statistic can take, and have no width where all of n
    answers are right, or none is, or none of n moved. The exact binomial bound stands in there.

    Args:
        beyond: `unseen` of the independent units behind it.
    """
    low, high = found.low, found.high
    if low == high and found.value in (*within, 0.0):
        low, high = found.value - beyond, found.value + beyond
    return Estimate(
        found.value, *(bound if math.isnan(bound) else min(max(bound, within[0]), within[1]) for bound in (low, high))
    )


def over_seeds(values: ArrayLike, within: Range | None = None, confidence: float = 0.95) -> Estimate:
    """Return the mean of the same items under several training seeds, with an interval over seeds and items.

    Args:
        values: (seeds, items).
        within: what an item's value can be, see `bounded`; None: anything, as of a loss.
    """
    found = np.asarray(values, dtype=float)
    averaged = found.mean(axis=0)
    count = len(averaged)
    error = float(averaged.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    estimate = seed_interval(found.mean(axis=1).tolist(), error, count, confidence)
    return estimate if within is None else bounded(estimate, within, unseen(np.ones(count), confidence))


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
