"""The sign-flip test against brute force and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from alula.errors import UsageError
from alula.stats import Resampling
from studies.signs import sign_test

HOW = Resampling(resamples=500)


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_exact_p_is_brute_forces(count: int) -> None:
    values = np.random.default_rng(count).normal(0.5, 1, count)
    sums = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=count)]
    found = sign_test(values.tolist(), HOW)
    assert found.exact
    assert found.p == np.mean(np.array(sums) >= abs(values.sum()) - 1e-12)
    assert (found.n, found.value) == (count, pytest.approx(values.mean()))


def test_exact_p_is_scipys() -> None:
    values = np.random.default_rng(3).normal(0.4, 1, 12)
    expected = stats.permutation_test(
        (values, np.zeros(12)), lambda x, y: abs(x.sum() - y.sum()), permutation_type="samples", n_resamples=np.inf,
        alternative="greater",
    )  # fmt: skip
    assert sign_test(values.tolist(), HOW).p == pytest.approx(expected.pvalue)


def test_equal_values_and_zeros() -> None:
    assert sign_test([0.3] * 21, HOW).p == 2 / 2**21
    assert sign_test([0.0, 0.0, 0.0], HOW).p == 1
    assert sign_test([1.0, -1.0], HOW).p == 1


def test_many_values_draw_their_signs() -> None:
    values = np.random.default_rng(0).normal(0, 1, 60)
    found = sign_test(values.tolist(), Resampling(resamples=4000))
    assert not found.exact
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.03)
    assert found.low < values.mean() < found.high


def test_undefined_values_are_refused() -> None:
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(UsageError, match="needs values"):
            sign_test(values)
