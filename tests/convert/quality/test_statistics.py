"""The paired bootstrap against cases whose answer is known."""

import math

import numpy as np
import pytest

from convert.quality.statistics import bootstrap_mean, paired_bootstrap, paired_ratio, summarize_distribution
from glm_jax.errors import GlmError


def binomial_quantile(n, p, share):
    """The smallest k with P(X <= k) >= share."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= share:
            return k
    raise AssertionError


@pytest.mark.parametrize(("units", "ones"), [(100, 50), (400, 40)])
def test_zeros_and_ones_have_a_binomial_interval(units, ones):
    a = np.zeros(units)
    a[:ones] = 1
    difference, low, high = paired_bootstrap(a, np.zeros(units), resamples=40_000)
    assert difference == ones / units
    # The ends are quantiles of 40,000 draws: off by at most one of the steps of 1/units.
    for found, share in ((low, 0.025), (high, 0.975)):
        assert abs(found - binomial_quantile(units, ones / units, share) / units) <= 1.01 / units


def test_windows_are_drawn_and_not_tokens():
    """Repeating every number within its window adds nothing that was not known."""
    a = np.random.default_rng(0).standard_normal(60)
    alone = bootstrap_mean(a)
    repeated = bootstrap_mean(np.repeat(a[:, None], 50, axis=1))
    np.testing.assert_allclose(repeated, alone, rtol=1e-12)
    _, low, high = bootstrap_mean(np.repeat(a, 50))
    assert high - low < (alone[2] - alone[1]) / 5


def test_what_both_share_cancels():
    b = 100 * np.random.default_rng(0).standard_normal((40, 7))
    np.testing.assert_allclose(paired_bootstrap(b + 0.5, b), (0.5, 0.5, 0.5), rtol=1e-10)
    assert paired_bootstrap(b, b) == (0, 0, 0)


def test_padding_does_not_count_and_short_windows_count_less():
    a = np.asarray([[1.0, 2.0, 3.0], [10.0, np.nan, np.nan], [np.nan, np.nan, np.nan]])
    difference, low, high = paired_bootstrap(a, np.zeros_like(a) * a)
    assert difference == (1 + 2 + 3 + 10) / 4
    assert (low, high) == (2.0, 10.0)


def test_the_same_seed_gives_the_same_interval():
    a = np.random.default_rng(0).standard_normal(30)
    assert bootstrap_mean(a, 500, seed=3) == bootstrap_mean(a, 500, seed=3)
    assert bootstrap_mean(a, 500, seed=3) != bootstrap_mean(a, 500, seed=4)


def test_many_units_are_drawn_in_parts(monkeypatch):
    from convert.quality import statistics

    a = np.random.default_rng(0).standard_normal(50)
    whole = bootstrap_mean(a, 1000)
    monkeypatch.setattr(statistics, "_COUNTS_PER_BATCH", 50 * 7)
    np.testing.assert_allclose(bootstrap_mean(a, 1000), whole, rtol=1e-12)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        _, low, high = bootstrap_mean(rng.standard_normal(80) + 3, 400)
        hits += low <= 3 <= high
    # 95 % less the known shortfall of percentiles at 80 units, and four standard deviations of the count.
    assert 0.94 - 4 * math.sqrt(0.95 * 0.05 / 400) <= hits / 400 <= 0.95 + 4 * math.sqrt(0.95 * 0.05 / 400)


def test_ratio():
    b = np.asarray([1.0, 1, 0, 1, 1, 1, 0, 1] * 10)
    ratio, low, high = paired_ratio(b / 2, b)
    assert (ratio, low, high) == (0.5, 0.5, 0.5)
    assert paired_ratio(b, np.zeros_like(b)) is None


def test_quantiles_leave_padding_out():
    values = np.asarray([[1.0, 2.0, np.nan], [3.0, 4.0, 100.0]], np.float32)
    assert summarize_distribution(values) == {
        "mean": 22.0,
        "median": 3.0,
        "p99": pytest.approx(np.quantile([1, 2, 3, 4, 100], 0.99)),
        "max": 100.0,
    }


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros(3), np.zeros(4), "same tokens"),
        (np.asarray([0.0, np.nan]), np.zeros(2), "same tokens"),
        (np.asarray([np.nan]), np.asarray([np.nan]), "nothing to take the mean of"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, words):
    with pytest.raises(GlmError, match=words):
        paired_bootstrap(a, b)
