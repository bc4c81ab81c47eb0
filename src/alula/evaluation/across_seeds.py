"""One comparison repeated over training seeds: mean, spread, and an interval that carries seeds and items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from alula.errors import EvaluationError
from alula.evaluation.results import Columns, Estimate, Labels, PairedResult, Record
from alula.stats import (
    CHANGE,
    SHARE,
    Range,
    Resampling,
    Side,
    Statistic,
    Sums,
    Unmoved,
    base_mean,
    bounded,
    difference,
    resample,
    retention,
    seed_interval,
    standard_error,
    tuned_mean,
    unseen,
)

_DEFAULT = Resampling(resamples=2_000)
"""ample for a standard error (to about 1.6 %), which is all that intervals over seeds take from the bootstrap"""


class Spread(Record):
    """A statistic over seeds. ``deviation`` is the sample standard deviation between seeds (None for one seed)."""

    mean: Estimate
    per_seed: list[float]
    deviation: float | None


class SeedsComparison(Record):
    """`PairedResult` over seeds: overall or one family. ``retention`` is None where some seed's base scores nothing;
    ``exact`` is that of `Comparison`, where no item fell (rose) in any seed."""

    n: int
    base: Spread
    tuned: Spread
    difference: Spread
    retention: Spread | None
    lost: list[int]
    gained: list[int]
    exact: tuple[Side, ...] = ()


class SeedsResult(Record):
    """One task over the training seeds of one method; ``groups`` are its families, or the values of another label."""

    task: str
    title: str
    same_items: bool
    """every seed answered the same prompts"""
    overall: SeedsComparison
    groups: dict[str, SeedsComparison]


def across_seeds(
    results: Sequence[PairedResult], by: str | tuple[str, ...] = "family", how: Resampling = _DEFAULT
) -> SeedsResult:
    """Combine one task's comparisons of several trainings; intervals as in `statistics.seed_interval`.

    Args:
        results: one per training seed.
        by: the label of the items to break the result down by: ``"family"`` or a tag that varies, such as
            ``"pattern"`` of dialogues; several labels are combined as ``"text, VT"``. An empty tuple: no groups, which
            spares their intervals.

    Raises:
        EvaluationError: no results, or results of different tasks or labels.
    """
    if not results:
        raise EvaluationError("no results to combine over seeds")
    first = results[0]
    for other in results[1:]:
        if other.task != first.task:
            raise EvaluationError(f"the seeds answered other tasks: {first.task!r} and {other.task!r}")
    wanted = (by,) if isinstance(by, str) else by
    labels = [_labels(result, wanted) for result in results]
    groups = labels[0].values
    if any(sorted(other.values) != sorted(groups) for other in labels):
        raise EvaluationError(f"the seeds of task {first.task!r} differ in {', '.join(wanted)}")
    same = len({result.items_digest for result in results}) == 1
    columns = [result.columns for result in results]

    def part(group: str | None) -> SeedsComparison:
        return _combine([_select(c, n, group) for c, n in zip(columns, labels, strict=True)], same, how)

    return SeedsResult(
        task=first.task,
        title=first.title,
        same_items=same,
        overall=part(None),
        groups={name: part(name) for name in groups},
    )


_Scores = tuple[np.ndarray, np.ndarray, np.ndarray]
"""base scores, tuned scores, cluster labels; each (items,)"""


def _labels(result: PairedResult, by: Sequence[str]) -> Labels:
    found = result.columns.labels
    missing = [name for name in by if name not in found]
    if missing:
        raise EvaluationError(f"task {result.task!r} has no label {missing[0]!r}, only {', '.join(found)}")
    if len(by) == 1:
        return found[by[0]]
    parts = [[found[name].values[index] for index in found[name].index] for name in by]
    return Labels.of([", ".join(combined) for combined in zip(*parts, strict=True)])


def _select(columns: Columns, labels: Labels, group: str | None) -> _Scores:
    keep = np.ones(len(columns.base), dtype=bool)
    if group is not None:
        keep = np.array(labels.index) == labels.values.index(group)
    return np.array(columns.base)[keep], np.array(columns.tuned)[keep], np.array(columns.cluster)[keep]


def _combine(scores: Sequence[_Scores], same: bool, how: Resampling) -> SeedsComparison:
    # the items' part of the chance: resample them under the seed-averaged scores. Where every seed drew its own
    # items, the spread between seeds holds their chance already
    averaged = _averaged(scores) if same else None
    resampled = resample(averaged, how) if averaged is not None else None

    units = averaged if averaged is not None else _together(scores)
    fell, rose = (any(each) for each in zip(*map(_moved, scores), strict=True))
    beyond = Unmoved.of(units, fell=fell, rose=rose, confidence=how.confidence)
    nothing = unseen(units.size, how.confidence)

    def spread(
        statistic: Statistic,
        within: Range = SHARE,
        widened: Callable[[Estimate], Estimate] = lambda found: found,
    ) -> Spread:
        per_seed = [
            float(statistic(base.sum(), tuned.sum(), np.asarray(float(len(base))))) for base, tuned, _ in scores
        ]
        error = standard_error(resampled, statistic) if resampled is not None else 0.0
        clusters = len(averaged.base) if averaged is not None else 0
        mean = widened(seed_interval(per_seed, error, clusters, how.confidence))
        return Spread(
            mean=bounded(mean, within, nothing),
            per_seed=per_seed,
            deviation=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        )

    return SeedsComparison(
        n=len(scores[0][0]),
        base=spread(base_mean),
        tuned=spread(tuned_mean),
        difference=spread(difference, CHANGE, widened=beyond.difference),
        retention=spread(retention, (0.0, math.inf), widened=beyond.retention)
        if all(base.sum() > 0 for base, _, _ in scores)
        else None,
        lost=[int(((base >= 1) & (tuned < 1)).sum()) for base, tuned, _ in scores],
        gained=[int(((base < 1) & (tuned >= 1)).sum()) for base, tuned, _ in scores],
        exact=beyond.sides,
    )


def _moved(scores: _Scores) -> tuple[bool, bool]:
    """Whether any item's score fell, and rose."""
    base, tuned, _ = scores
    return bool((tuned < base).any()), bool((tuned > base).any())


def _together(scores: Sequence[_Scores]) -> Sums:
    """The clusters of all seeds, each of which asked its own items."""
    every = [Sums.of(*one) for one in scores]
    base, tuned, size = (np.concatenate([getattr(one, name) for one in every]) for name in ("base", "tuned", "size"))
    return Sums(base=base, tuned=tuned, size=size)


def _averaged(scores: Sequence[_Scores]) -> Sums:
    """Scores averaged over the seeds, which share their items."""
    base, tuned = (np.mean([one[k] for one in scores], axis=0) for k in (0, 1))
    return Sums.of(base, tuned, scores[0][2])
