"""Every statistic against an independent computation."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from alula import stats as statistics
from alula.evaluation import Estimate
from alula.stats import Resampling, Sums

RNG = np.random.default_rng(11)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (371, 400), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(correct: int, n: int, confidence: float) -> None:
    ours = statistics.wilson(correct, n, confidence)
    theirs = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert ours.value == correct / n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_wilson_bounds_solve_the_score_equation() -> None:
    estimate = statistics.wilson(37, 50)
    z = NormalDist().inv_cdf(0.975)
    for bound in (estimate.low, estimate.high):
        assert abs(0.74 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 50), abs=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 5), (9, 2), (0, 12), (40, 22)])
def test_mcnemar_is_the_exact_binomial_tail(lost: int, gained: int) -> None:
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    assert statistics.mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_holm_is_the_closed_testing_procedure() -> None:
    """Holm = closed testing with Bonferroni: adjusted p = max over the subsets that contain the hypothesis."""
    for _ in range(50):
        p = RNG.random(5) ** 3
        subsets = [s for r in range(1, 6) for s in itertools.combinations(range(5), r)]
        expected = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(5)]
        assert statistics.holm(list(p)) == pytest.approx(expected)


def bootstrapped(sums: Sums, statistic: statistics.Statistic, resamples: int = 10_000) -> Estimate:
    return statistics.bootstrap(sums, statistics.resample(sums, Resampling(resamples=resamples)), statistic)


def naive_bootstrap(base: np.ndarray, tuned: np.ndarray, cluster: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draw clusters one by one, gather their items, average: (resamples, 2) of difference and ratio."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(cluster == label) for label in np.unique(cluster)]
    rows = []
    for _ in range(resamples):
        items = np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))])
        rows.append((tuned[items].mean() - base[items].mean(), tuned[items].mean() / base[items].mean()))
    return np.array(rows)


@pytest.mark.parametrize("cluster_size", [1, 3])
def test_bootstrap_agrees_with_drawing_one_by_one(cluster_size: int) -> None:
    n = 120
    base = (RNG.random(n) < 0.85).astype(float)
    tuned = np.where(RNG.random(n) < 0.25, RNG.random(n) < 0.4, base).astype(float)
    cluster = np.arange(n) // cluster_size
    naive = naive_bootstrap(base, tuned, cluster, 6000, seed=3)
    sums = Sums.of(base, tuned, cluster)
    for column, statistic in enumerate((statistics.difference, statistics.retention)):
        resampled = statistics.resample(sums, Resampling(resamples=20_000))
        ours = statistics.bootstrap(sums, resampled, statistic)
        low, high = np.quantile(naive[:, column], [0.025, 0.975])
        width = high - low
        assert ours.low == pytest.approx(low, abs=0.06 * width)
        assert ours.high == pytest.approx(high, abs=0.06 * width)
        error = statistics.standard_error(resampled, statistic)
        assert error == pytest.approx(naive[:, column].std(), rel=0.06)


def test_bootstrap_of_the_difference_agrees_with_scipys() -> None:
    base = (RNG.random(200) < 0.7).astype(float)
    tuned = np.where(RNG.random(200) < 0.3, 1 - base, base)
    theirs = stats.bootstrap((tuned - base,), np.mean, method="percentile", n_resamples=20_000, rng=0)
    ours = bootstrapped(Sums.of(base, tuned), statistics.difference, 20_000)
    assert ours.value == pytest.approx((tuned - base).mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.006)


def test_totals_that_are_remembered_are_those_of_their_own_rows() -> None:
    """Of rows that come as often as others, and of another seed, one gets other totals; of the same ones the same."""
    rows = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    how = Resampling(resamples=50)
    first = statistics.resample_totals(rows, how)
    assert np.array_equal(first, statistics.resample_totals(rows.copy(), how))
    assert np.array_equal(2 * first, statistics.resample_totals(2 * rows, how))
    assert not np.array_equal(first, statistics.resample_totals(rows, Resampling(resamples=50, seed=1)))
    assert statistics.resample_totals(rows, Resampling(resamples=60)).shape == (60, 2)


def test_clusters_widen_the_interval_of_dependent_items() -> None:
    base = np.ones(90)
    tuned = np.repeat(RNG.random(30) < 0.6, 3).astype(float)
    alone = bootstrapped(Sums.of(base, tuned), statistics.difference)
    grouped = bootstrapped(Sums.of(base, tuned, np.arange(90) // 3), statistics.difference)
    assert grouped.high - grouped.low > 1.4 * (alone.high - alone.low)


def test_a_ratio_whose_base_can_vanish_is_unbounded_above() -> None:
    estimate = bootstrapped(Sums.of([1, 0, 0], [1, 1, 1]), statistics.retention)
    assert estimate.value == 3
    assert estimate.high is math.nan


def test_seed_interval_without_item_error_is_students() -> None:
    values = [0.91, 0.95, 0.90]
    ours = statistics.seed_interval(values, 0.0, 0)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (ours.low, ours.high) == (pytest.approx(low), pytest.approx(high))


def test_seed_interval_of_one_seed_is_the_items_alone() -> None:
    ours = statistics.seed_interval([0.5], 0.02, 101)
    assert ours.high - 0.5 == pytest.approx(stats.t.ppf(0.975, 100) * 0.02)


def test_seed_interval_covers() -> None:
    """95 % intervals over 3 seeds that share 200 items contain the truth at least about 95 % of the time."""
    rng = np.random.default_rng(5)
    hits, trials, truth = 0, 400, 0.8
    for _ in range(trials):
        ability = rng.normal(0, 0.03, 3)
        hard = rng.normal(0, 0.1, 200)
        scores = (rng.random((3, 200)) < np.clip(truth + ability[:, None] + hard, 0, 1)).astype(float)
        sums = Sums.of(np.ones(200), scores.mean(0))
        error = statistics.standard_error(statistics.resample(sums, Resampling(resamples=400)), statistics.retention)
        estimate = statistics.seed_interval(list(scores.mean(1)), error, 200)
        hits += estimate.low <= truth <= estimate.high
    assert hits / trials > 0.93


def test_shares_stay_shares_and_nothing_seen_is_no_proof() -> None:
    """The t interval of one seed reaches beyond what a share can be, and has no width where nothing varies."""
    values = np.ones((3, 40))
    exact = stats.binomtest(40, 40).proportion_ci(0.95, method="exact").low
    all_right = statistics.over_seeds(values, statistics.SHARE)
    assert (all_right.value, all_right.high) == (1.0, 1.0)
    assert all_right.low == pytest.approx(exact)
    unmoved = statistics.over_seeds(values - values, statistics.CHANGE)
    assert (unmoved.low, unmoved.high) == pytest.approx((exact - 1, 1 - exact))
    values[:, 0] = (1, 0, 1)
    plain, within = statistics.over_seeds(values), statistics.over_seeds(values, statistics.SHARE)
    averaged = values.mean(axis=0)
    error = averaged.std(ddof=1) / math.sqrt(40)
    assert plain == statistics.seed_interval(values.mean(axis=1).tolist(), error, 40)
    assert plain.high > 1.0
    assert within == Estimate(plain.value, plain.low, 1.0)
