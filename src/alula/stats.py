"""Numbers with intervals, and how the intervals are made: bootstrap over samples, for probes and evaluations alike.

R resamples, K kept samples, N samples seen in all, L layers or states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alula.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Base of all results."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values; undefined numbers (NaN, infinities) become None."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Estimate(Result):
    """A number with a bootstrap interval over samples; `low` and `high` are NaN where none can be given."""

    value: float
    low: float = math.nan
    high: float = math.nan


Curve = tuple[Estimate, ...]
"""One estimate per layer or state."""


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        confidence: of the percentile interval.
        resamples: number of bootstrap resamples.
        permutations: number of random re-pairings behind each permutation null.
        seed: of all draws.
    """

    confidence: float = 0.95
    resamples: int = 1000
    permutations: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence must lie between 0 and 1, not {self.confidence}")
        if self.resamples < 1 or self.permutations < 1:
            raise UsageError("resamples and permutations must be at least 1")

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


def means(weights: Array, entries: Array) -> Array:
    """(R, ...) weighted means of entries (K, ...)."""
    return np.tensordot(weights, entries, axes=1)


def weighted(weights: Array, values: Array) -> Array:
    """(R,) weighted means of values (K,), of which the undefined ones are left out."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights @ np.where(defined, values, 0) / (weights @ defined)


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
