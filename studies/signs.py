"""Is a difference of one sign over independent trainings? Sign-flip permutation test, and an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from alula.errors import UsageError
from alula.evaluation.results import Estimate
from alula.stats import PAIRED, Range, Resampling, bounded, percentile_interval, unseen

MOST_EXACT = 40
"""up to so many values all assignments of signs are counted; of more, `Resampling.resamples` are drawn"""


@dataclass(frozen=True, kw_only=True)
class SignTest(Estimate):
    """A mean with its bootstrap interval, and the two-sided p value that its sign might as well have been the other.

    Attributes:
        n: values behind it.
        p: share of all assignments of signs to the values whose mean is at least as far from 0.
        exact: all of them were counted.
    """

    n: int
    p: float
    exact: bool


def sign_test(values: Sequence[float], how: Resampling = PAIRED, *, within: Range | None = None) -> SignTest:
    """Test whether values scatter about 0; under the null hypothesis each might have had the other sign.

    Args:
        within: what a value can be, where it has bounds (`alula.stats.bounded`).

    Raises:
        UsageError: no values, or undefined ones.
    """
    found = np.asarray(values, dtype=float)
    if not len(found) or not np.isfinite(found).all():
        raise UsageError("a sign test needs values, all of them defined")
    exact = len(found) <= MOST_EXACT
    least = abs(found.sum()) - 1e-12 * np.abs(found).sum()
    if exact:
        p = _as_far(found, least) / 2 ** len(found)
    else:
        signs = np.random.default_rng(how.seed + 1).choice([-1.0, 1.0], size=(how.resamples, len(found)))
        p = (1 + int((np.abs(signs @ found) >= least).sum())) / (1 + how.resamples)
    draws = np.random.default_rng(how.seed).integers(len(found), size=(how.resamples, len(found)))
    interval = percentile_interval(float(found.mean()), found[draws].mean(axis=1), how.confidence)
    if within is not None:
        interval = bounded(interval, within, unseen(np.ones(len(found)), how.confidence))
    return SignTest(**asdict(interval), n=len(found), p=p, exact=exact)


def _as_far(values: NDArray[np.float64], least: float) -> int:
    """How many assignments of signs make a sum of at least ``least`` from 0, by meeting in the middle."""
    if least <= 0:
        return int(2 ** len(values))
    left, right = (_sums(half) for half in np.array_split(values, 2))
    right = np.sort(right)
    low = np.searchsorted(right, -least - left, side="right").sum()
    return int(low + (len(right) - np.searchsorted(right, least - left, side="left")).sum())


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums under all assignments of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums
