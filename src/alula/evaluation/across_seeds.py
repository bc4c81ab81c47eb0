"""One comparison repeated over training seeds: mean, spread, and an interval that carries seeds and items."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from alula.errors import EvaluationError
from alula.evaluation import statistics
from alula.evaluation.results import Columns, Estimate, PairedResult, Record


class Spread(Record):
    """A statistic over seeds. ``deviation`` is the sample standard deviation between seeds (None for one seed)."""

    mean: Estimate
    per_seed: list[float]
    deviation: float | None


class SeedsComparison(Record):
    """`PairedResult` over seeds: overall or one family. ``retention`` is None where some seed's base scores nothing."""

    n: int
    base: Spread
    tuned: Spread
    difference: Spread
    retention: Spread | None
    lost: list[int]
    gained: list[int]


class SeedsResult(Record):
    """One task over the training seeds of one method."""

    task: str
    title: str
    same_items: bool
    """every seed answered the same prompts"""
    overall: SeedsComparison
    families: dict[str, SeedsComparison]


def across_seeds(results: Sequence[PairedResult], *, confidence: float = 0.95, seed: int = 0) -> SeedsResult:
    """Combine one task's comparisons of several trainings; intervals as in `statistics.seed_interval`.

    Raises:
        EvaluationError: no results, or results of different tasks or families.
    """
    if not results:
        raise EvaluationError("no results to combine over seeds")
    first = results[0]
    for other in results[1:]:
        if other.task != first.task or list(other.families) != list(first.families):
            raise EvaluationError(f"seeds differ in task or families: {first.task!r} against {other.task!r}")
    same = len({result.items_digest for result in results}) == 1
    columns = [result.columns for result in results]

    def part(family: int | None) -> SeedsComparison:
        return _combine([_select(c, family) for c in columns], same, confidence, seed)

    return SeedsResult(
        task=first.task,
        title=first.title,
        same_items=same,
        overall=part(None),
        families={name: part(index) for index, name in enumerate(first.columns.families)},
    )


_Scores = tuple[np.ndarray, np.ndarray, np.ndarray]
"""base scores, tuned scores, cluster labels; each (items,)"""


def _select(columns: Columns, family: int | None) -> _Scores:
    keep = np.ones(len(columns.base), dtype=bool) if family is None else np.array(columns.family) == family
    return np.array(columns.base)[keep], np.array(columns.tuned)[keep], np.array(columns.cluster)[keep]


def _combine(scores: Sequence[_Scores], same: bool, confidence: float, seed: int) -> SeedsComparison:
    def spread(value: Callable[[np.ndarray, np.ndarray], float], statistic: statistics.Statistic) -> Spread:
        per_seed = [value(base, tuned) for base, tuned, _ in scores]
        if same:  # the items' part of the chance: resample them under the seed-averaged scores
            base = np.mean([s[0] for s in scores], axis=0)
            tuned = np.mean([s[1] for s in scores], axis=0)
            sums = statistics.Sums.of(base, tuned, scores[0][2])
            error, units = statistics.standard_error(sums, statistic, seed=seed), len(sums.base)
        else:  # every seed drew its own items: the spread between seeds holds their chance too
            error, units = 0.0, 0
        return Spread(
            mean=statistics.seed_interval(per_seed, error, units, confidence),
            per_seed=per_seed,
            deviation=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        )

    retained = all(base.sum() > 0 for base, _, _ in scores)
    return SeedsComparison(
        n=len(scores[0][0]),
        base=spread(lambda base, tuned: float(base.mean()), lambda base, tuned, size: base / size),
        tuned=spread(lambda base, tuned: float(tuned.mean()), lambda base, tuned, size: tuned / size),
        difference=spread(lambda base, tuned: float(tuned.mean() - base.mean()), statistics.difference),
        retention=spread(lambda base, tuned: float(tuned.sum() / base.sum()), statistics.retention)
        if retained
        else None,
        lost=[int(((base >= 1) & (tuned < 1)).sum()) for base, tuned, _ in scores],
        gained=[int(((base < 1) & (tuned >= 1)).sum()) for base, tuned, _ in scores],
    )
