"""Areas under curves against scikit-learn and plain loops; p values against counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from alula.errors import UsageError
from alula.stats import Resampling
from studies.ranking import difference, rank

HOW = Resampling(resamples=2000)


@pytest.mark.parametrize("seed", range(5))
def test_areas_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    failed = rng.permutation([True] * 7 + [False] * 13)
    figure = np.round(rng.normal(size=20) + failed, 1)  # rounding makes ties
    found = rank(figure, failed, how=HOW)
    assert (found.runs, found.failed) == (20, 7)
    assert found.auc.value == pytest.approx(roc_auc_score(failed, figure))
    assert found.precision.value == pytest.approx(average_precision_score(failed, figure))
    assert found.auc.low <= found.auc.value <= found.auc.high


def test_p_counts_the_ways_to_say_who_failed() -> None:
    rng = np.random.default_rng(1)
    figure = np.round(rng.normal(size=9), 1)
    failed = np.array([True, True, False, True, False, False, False, True, False])
    value = roc_auc_score(failed, figure)
    ways = []
    for chosen in itertools.combinations(range(9), 4):
        ways.append(roc_auc_score(np.isin(np.arange(9), chosen), figure))
    found = rank(figure, failed).auc
    assert found.exact
    assert found.permutations == len(ways) == 126
    assert found.p == pytest.approx(np.mean(np.array(ways) >= value - 1e-12))


def test_strata_compare_only_within() -> None:
    figure = np.array([1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
    failed = np.array([False, True, False, True, True, False])
    labels = ["low"] * 3 + ["high"] * 3
    pairs = [(1, 0), (1, 2), (3, 5), (4, 5)]  # failed against held, of one label
    expected = np.mean([figure[one] > figure[two] for one, two in pairs])
    found = rank(figure, failed, strata=labels)
    assert found.auc.value == pytest.approx(expected)
    assert found.auc.permutations == 3 * 3
    assert found.precision is None


def test_many_runs_are_permuted_at_random_and_chance_gives_even_p_values() -> None:
    rng = np.random.default_rng(0)
    values = []
    for _ in range(60):
        failed = rng.permutation([True] * 12 + [False] * 12)
        found = rank(rng.normal(size=24), failed, how=Resampling(resamples=300)).auc
        assert not found.exact
        values.append(found.p)
    assert 0.3 < np.mean(values) < 0.7
    assert np.mean(np.array(values) < 0.1) < 0.3


def test_the_difference_of_two_figures_resamples_them_together() -> None:
    rng = np.random.default_rng(2)
    failed = rng.permutation([True] * 10 + [False] * 10)
    good, bad = failed + rng.normal(size=20) * 0.3, rng.normal(size=20)
    found = difference(good, bad, failed, HOW)
    assert found.value == pytest.approx(roc_auc_score(failed, good) - roc_auc_score(failed, bad))
    draws, values = np.random.default_rng(9), []
    while len(values) < 400:
        chosen = draws.integers(20, size=20)
        if 0 < failed[chosen].sum() < 20:
            both = [roc_auc_score(failed[chosen], figure[chosen]) for figure in (good, bad)]
            values.append(both[0] - both[1])
    assert (found.low, found.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.06)
    same = difference(good, good, failed, HOW)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_nothing_to_tell_apart() -> None:
    found = rank([1.0, 2.0, 3.0], [True, True, True])
    assert found.auc is None
    assert found.precision is None
    assert difference([1.0, 2.0], [1.0, 3.0], [True, True]) is None
    with pytest.raises(UsageError):
        rank([1.0, float("nan")], [True, False])
