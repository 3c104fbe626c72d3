"""Interval estimates against scipy, closed forms and cases small enough to do on paper."""

import math

import numpy as np
import pytest
from scipy import stats

from evaluators.tables.statistics import no_event_bound, paired_bootstrap, pearson, slope_and_spearman, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (1, 7), (19, 20), (20, 20), (350, 1000)])
def test_wilson_agrees_with_scipy(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_ends_and_errors():
    assert all(math.isnan(end) for end in wilson(0, 0))
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="6 of 5"):
        wilson(6, 5)


def test_no_event_bound_is_the_rule_of_three():
    assert no_event_bound(100) == pytest.approx(3 / 100, rel=0.02)
    assert (1 - no_event_bound(20)) ** 20 == pytest.approx(0.05)


def test_token_weighted_difference_by_hand():
    # (2 + 30) / (1 + 10) - (1 + 10) / (1 + 10) = 21 / 11; a mean of per-prompt means would give 1.5.
    estimate = paired_bootstrap([2, 30], [1, 10], [1, 10], [1, 10])
    assert estimate.value == pytest.approx(21 / 11)
    # Resamples hold prompt 1 twice (1), prompt 2 twice (2) or both (21/11): a quarter, a quarter, a half.
    assert (estimate.low, estimate.high) == pytest.approx((1.0, 2.0))


def test_undefined_outcomes_do_not_count():
    # Third prompt has no gold value: rates are 2/2 and 1/2.
    estimate = paired_bootstrap([1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0])
    assert estimate.value == pytest.approx(0.5)
    assert (estimate.low, estimate.high) == (0.0, 1.0)
    undefined = paired_bootstrap([0, 0], [0, 0], [0, 0], [0, 0])
    assert all(math.isnan(part) for part in undefined)


def test_pairing_removes_the_spread_between_prompts():
    generator = np.random.default_rng(1)
    baseline = generator.normal(3.0, 2.0, 50)
    ones = np.ones(50)
    paired = paired_bootstrap(baseline + 0.1, ones, baseline, ones)
    assert paired == pytest.approx((0.1, 0.1, 0.1))
    shuffled = paired_bootstrap(generator.permutation(baseline) + 0.1, ones, baseline, ones)
    assert shuffled.high - shuffled.low > 0.5


def test_interval_matches_the_normal_approximation():
    generator = np.random.default_rng(2)
    difference = generator.normal(0.3, 1.0, 400)
    estimate = paired_bootstrap(difference, np.ones(400), np.zeros(400), np.ones(400), resamples=4000)
    half = 1.96 * difference.std() / math.sqrt(400)
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.1)


def test_coverage_is_near_nominal():
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        tokens = generator.integers(5, 20, 60)
        baseline = generator.normal(2.0, 1.0, 60) * tokens
        condition = baseline + generator.normal(0.2, 0.5, 60) * tokens
        estimate = paired_bootstrap(condition, tokens, baseline, tokens, resamples=500)
        hits += estimate.low <= 0.2 <= estimate.high
    assert 0.89 <= hits / 300 <= 0.99


def test_same_seed_same_interval_and_other_seed_another():
    values = np.random.default_rng(4).normal(size=30)
    ones, zeros = np.ones(30), np.zeros(30)
    first = paired_bootstrap(values, ones, zeros, ones, seed=5)
    assert first == paired_bootstrap(values, ones, zeros, ones, seed=5)
    assert first != paired_bootstrap(values, ones, zeros, ones, seed=6)


def test_one_prompt_has_no_interval():
    estimate = paired_bootstrap([3.0], [2.0], [1.0], [2.0])
    assert estimate.value == 1.0
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_shapes_must_match():
    with pytest.raises(ValueError, match="one entry per prompt"):
        paired_bootstrap([1, 2], [1, 1], [1], [1])
    with pytest.raises(ValueError, match="dose, prompt"):
        slope_and_spearman([0, 1], [[1, 2]], [[1, 1]])


def test_replicas_are_resampled_too():
    """Equal replicas change nothing; replicas that differ widen the interval, around the mean over them."""
    generator = np.random.default_rng(3)
    values, ones, zeros = generator.normal(1, 0.5, 30), np.ones(30), np.zeros(30)
    alone = paired_bootstrap(values, ones, zeros, ones)
    same = paired_bootstrap(np.stack([values] * 3), ones, zeros, ones)
    assert same == pytest.approx(alone, rel=1e-12)
    apart = paired_bootstrap(np.stack([values - 1, values, values + 1]), ones, zeros, ones)
    assert apart.value == pytest.approx(alone.value)
    assert apart.high - apart.low > 2 * (alone.high - alone.low)
    tops = np.stack([np.zeros((3, 30)), np.stack([values - 1, values, values + 1])])
    slope, _ = slope_and_spearman([0, 1], tops, np.ones_like(tops))
    assert slope == pytest.approx(apart)


def test_slope_and_spearman_agree_with_scipy():
    alpha = [0.0, 0.25, 0.5, 1.0]
    generator = np.random.default_rng(7)
    values = np.array([[1.0], [0.7], [0.8], [0.2]]) + generator.normal(0, 0.01, (4, 40))
    slope, rho = slope_and_spearman(alpha, values, np.ones_like(values))
    metric = values.mean(axis=1)
    assert slope.value == pytest.approx(stats.linregress(alpha, metric).slope)
    assert rho.value == pytest.approx(stats.spearmanr(alpha, metric).statistic)
    assert slope.low < slope.value < slope.high < 0
    assert rho.low <= rho.value <= rho.high


def test_constant_metric_has_slope_zero_and_no_rank_correlation():
    slope, rho = slope_and_spearman([0, 0.5, 1], np.ones((3, 10)), np.ones((3, 10)))
    assert slope == (0.0, 0.0, 0.0)
    assert all(math.isnan(part) for part in rho)
    slope, rho = slope_and_spearman([1.0], np.ones((1, 10)), np.ones((1, 10)))
    assert math.isnan(slope.value)
    assert math.isnan(rho.value)


def test_pearson_agrees_with_scipy():
    generator = np.random.default_rng(1)
    x = 1e-3 * generator.normal(size=40) + 5.0
    y = 2 * x + 1e-3 * generator.normal(size=40)
    found, expected = pearson(x, y), stats.pearsonr(x, y)
    assert found.value == pytest.approx(expected.statistic)
    theirs = expected.confidence_interval(method=stats.BootstrapMethod(method="percentile", rng=generator))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.04)
    assert found == pearson(x, y)


def test_pearson_of_what_does_not_vary_is_unknown():
    assert all(math.isnan(one) for one in pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).value == pytest.approx(1.0)
