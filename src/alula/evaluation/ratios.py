"""Figures that are ratios of sums over items (precision, F1, CHAIR), with intervals that resample clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alula.evaluation.results import Estimate, ItemResult, Labels, Ratio, RatioComparison
from alula.stats import CHANGE, PAIRED, SHARE, Range, Resampling, bounded, percentile_interval, resample_totals, unseen

ALL = "all"
"""the group of all items"""


def figures(
    items: Sequence[ItemResult], ratios: Sequence[Ratio], how: Resampling = PAIRED
) -> dict[str, dict[str, Estimate | None]]:
    """Return every ratio over all items and over each family, with its percentile bootstrap interval over clusters."""
    if not ratios:
        return {}
    names = _names(ratios)
    found: dict[str, dict[str, Estimate | None]] = {}
    for group, part in _groups(items).items():
        chosen = [items[i] for i in part]
        rows = _by_cluster(_counts(chosen, names), _units(chosen))
        whole, totals = rows.sum(axis=0), resample_totals(rows, how)
        found[group] = {
            ratio.name: _estimate(
                _value(whole, ratio, names),
                _value(totals, ratio, names),
                how,
                _range(ratio),
                _below(rows, ratio, names),
            )
            for ratio in ratios
        }
    return found


def compared_figures(
    base: Sequence[ItemResult], tuned: Sequence[ItemResult], ratios: Sequence[Ratio], how: Resampling = PAIRED
) -> dict[str, dict[str, RatioComparison]]:
    """Return every ratio of two models on the same items; clusters are resampled for both together."""
    if not ratios:
        return {}
    names = _names(ratios)
    found: dict[str, dict[str, RatioComparison]] = {}
    for group, part in _groups(base).items():
        before, after = [base[i] for i in part], [tuned[i] for i in part]
        both = np.concatenate([_counts(before, names), _counts(after, names)], axis=1)
        rows = _by_cluster(both, _units(before))
        (first, second), (firsts, seconds) = (
            np.split(table, 2, axis=-1) for table in (rows.sum(axis=0), resample_totals(rows, how))
        )
        found[group] = {}
        for ratio in ratios:
            one, many = _value(first, ratio, names), _value(firsts, ratio, names)
            other, others = _value(second, ratio, names), _value(seconds, ratio, names)
            within, (below, below_other) = (
                _range(ratio),
                (_below(part, ratio, names) for part in np.split(rows, 2, axis=1)),
            )
            found[group][ratio.name] = RatioComparison(
                base=_estimate(one, many, how, within, below),
                tuned=_estimate(other, others, how, within, below_other),
                difference=_estimate(
                    other - one, others - many, how, within and CHANGE, np.maximum(below, below_other)
                ),
            )
    return found


def _names(ratios: Sequence[Ratio]) -> list[str]:
    return sorted({name for ratio in ratios for name in (*ratio.over, *ratio.under)})


def _groups(items: Sequence[ItemResult]) -> dict[str, list[int]]:
    families: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        families.setdefault(item.family, []).append(index)
    return {ALL: list(range(len(items))), **(families if len(families) > 1 else {})}


def _units(items: Sequence[ItemResult]) -> NDArray[np.int64]:
    """The cluster of each item by number; items that ask the same are one unit."""
    return np.array(Labels.of([item.cluster or item.prompt_hash for item in items]).index)


def _counts(items: Sequence[ItemResult], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[item.counts.get(name, 0.0) for name in names] for item in items], dtype=np.float64)


def _by_cluster(counts: NDArray[np.float64], units: NDArray[np.int64]) -> NDArray[np.float64]:
    rows = np.zeros((int(units.max()) + 1, counts.shape[1]))
    np.add.at(rows, units, counts)
    return rows


def _value(totals: NDArray[np.float64], ratio: Ratio, names: Sequence[str]) -> NDArray[np.float64]:
    """The ratio of totals (..., K) -> (...); NaN where the denominator is 0."""
    over, under = (np.array([weights.get(name, 0.0) for name in names]) for weights in (ratio.over, ratio.under))
    bottom = totals @ under
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, (totals @ over) / bottom)


def _below(rows: NDArray[np.float64], ratio: Ratio, names: Sequence[str]) -> NDArray[np.float64]:
    """(clusters,) what each counts for below the line."""
    return np.abs(rows @ np.array([ratio.under.get(name, 0.0) for name in names]))


def _range(ratio: Ratio) -> Range | None:
    return SHARE if ratio.unit == "share" else None


def _estimate(
    value: NDArray[np.float64],
    replicates: NDArray[np.float64],
    how: Resampling,
    within: Range | None,
    units: NDArray[np.float64],
) -> Estimate | None:
    if np.isnan(value):
        return None
    found = percentile_interval(float(value), replicates, how.confidence)
    if within is not None:
        found = bounded(found, within, unseen(units, how.confidence))
    if found.low == found.high and np.count_nonzero(units) == 1:  # resampling one thing has nothing to vary
        return Estimate(value=found.value, low=math.nan, high=math.nan)
    return found
