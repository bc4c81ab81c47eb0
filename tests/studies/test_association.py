"""Correlation over runs, against scipy, brute force and populations whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from alula.errors import UsageError
from alula.stats import Resampling
from studies.association import associate

HOW = Resampling(resamples=400)


def population(runs: int = 6, steps: int = 4, slope: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(runs, 1))
    x = own + 0.3 * rng.normal(size=(runs, steps))
    return x, slope * own + 0.3 * rng.normal(size=(runs, steps))


def test_coefficients_are_scipys() -> None:
    x, y = population()
    found = associate(x, y, how=HOW)
    assert found.pearson.value == pytest.approx(stats.pearsonr(x.ravel(), y.ravel()).statistic)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic)
    assert (found.runs, found.models) == (6, 24)
    y = np.round(y)  # ties
    assert associate(x, y, how=HOW).spearman.value == pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic)


def test_exact_p_values_are_those_of_brute_force() -> None:
    x, y = population(runs=5, slope=0.5)
    found = associate(x, y, how=HOW)
    values = [
        abs(stats.pearsonr(x.ravel(), y[list(order)].ravel()).statistic) for order in itertools.permutations(range(5))
    ]
    assert found.pearson.exact
    assert found.pearson.permutations == 120
    assert found.pearson.p == np.mean(np.array(values) >= abs(found.pearson.value) - 1e-12)


def test_single_checkpoints_give_scipys_permutation_test() -> None:
    x, y = population(runs=7, steps=1, slope=0.4)
    expected = stats.permutation_test(
        (x[:, 0],),
        lambda one: abs(stats.pearsonr(one, y[:, 0]).statistic),
        permutation_type="pairings",
        n_resamples=np.inf,
        alternative="greater",
    )
    found = associate(x, y, how=HOW)
    assert found.pearson.exact
    assert found.pearson.p == pytest.approx(expected.pvalue)


def test_within_run_looks_past_what_tells_runs_apart() -> None:
    rng = np.random.default_rng(1)
    level, wiggle = rng.normal(size=(8, 1)), rng.normal(size=(8, 5))
    x, y = level + 0.1 * wiggle, level - 0.1 * wiggle
    assert associate(x, y, how=HOW).pearson.value > 0.9
    inside = associate(x, y, within="run", how=HOW)
    assert inside.pearson.value == pytest.approx(-1)
    assert inside.pearson.p < 0.01


def test_within_step_takes_a_shared_trend_out() -> None:
    rng = np.random.default_rng(2)
    trend = np.linspace(0, 5, 4)
    x, y = trend + rng.normal(size=(9, 4)), trend + rng.normal(size=(9, 4))
    assert associate(x, y, how=HOW).pearson.value > 0.6
    without = associate(x, y, within="step", how=HOW).pearson
    assert abs(without.value) < 0.5
    assert without.low < 0 < without.high
    residual_x, residual_y = x - x.mean(axis=0), y - y.mean(axis=0)
    assert without.value == pytest.approx(stats.pearsonr(residual_x.ravel(), residual_y.ravel()).statistic)


def test_a_trend_that_all_runs_share_is_no_evidence() -> None:
    steps = np.arange(4.0)
    x, y = np.tile(steps, (6, 1)), np.tile(steps**2, (6, 1))
    assert associate(x, y, how=HOW).pearson.value > 0.9
    assert associate(x, y, how=HOW).pearson.p == 1


def test_within_strata_pairs_runs_of_one_stratum_only() -> None:
    strata = [0.1] * 3 + [0.2] * 3
    x, y = population(runs=6)
    x[:3] += 50  # what tells the strata apart
    y[:3] += 50
    found = associate(x, y, within="stratum", strata=strata, how=HOW)
    assert found.pearson.permutations == 36
    apart = [values - np.repeat([values[:3].mean(), values[3:].mean()], 3)[:, None] for values in (x, y)]
    assert found.pearson.value == pytest.approx(stats.pearsonr(apart[0].ravel(), apart[1].ravel()).statistic)


def test_many_runs_draw_their_permutations() -> None:
    x, y = population(runs=12, slope=0.0, seed=3)
    found = associate(x, y, how=HOW)
    assert not found.pearson.exact
    assert found.pearson.permutations == 400
    assert found.pearson.p > 0.05
    assert associate(*population(runs=12), how=HOW).pearson.p == pytest.approx(1 / 401)


def test_intervals_resample_runs_not_checkpoints() -> None:
    x, y = population(runs=6, steps=4, slope=0.3)
    once = associate(x, y, how=HOW).pearson
    copied = associate(np.repeat(x, 10, axis=1), np.repeat(y, 10, axis=1), how=HOW).pearson
    assert (copied.low, copied.high, copied.p) == pytest.approx((once.low, once.high, once.p))


def test_null_p_values_are_uniform_enough() -> None:
    p = [
        associate(*population(runs=5, slope=0.0, seed=seed), how=Resampling(resamples=2)).pearson.p
        for seed in range(200)
    ]
    assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.10


def test_what_cannot_be_correlated() -> None:
    flat = associate(np.ones((4, 2)), np.arange(8.0).reshape(4, 2), how=HOW)
    assert flat.pearson is None
    assert associate(np.arange(4.0)[:, None], np.arange(4.0)[:, None], within="run", how=HOW).pearson is None
    with pytest.raises(UsageError, match="two full"):
        associate([[1.0, np.nan]], [[1.0, 2.0]])
    with pytest.raises(UsageError, match="label per run"):
        associate([[1.0]], [[1.0]], within="stratum")
