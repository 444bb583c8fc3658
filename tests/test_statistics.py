"Intervals, equivalence, effect size and power against SciPy and simulation."
import numpy as np
import pytest
from scipy import stats

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.judge.statistics import MIN_PAIRS, hedges_g, paired_interval, paired_ratio, seeds_needed, tost, tost_power


@pytest.mark.parametrize("confidence", [0.90, 0.95])
def test_interval_is_scipys(rng_seed, confidence):
    d = np.random.default_rng(rng_seed).normal(size=7)
    estimate = paired_interval(d, confidence)
    low, high = stats.t.interval(confidence, 6, loc=d.mean(), scale=stats.sem(d))
    assert (estimate.value, estimate.lo, estimate.hi) == pytest.approx((d.mean(), low, high))


def test_interval_covers_the_truth_as_often_as_it_says(rng_seed):
    rng = np.random.default_rng(rng_seed)
    draws = [paired_interval(d, 0.90) for d in rng.normal(1.0, 3.0, (2000, 4))]
    covered = np.mean([e.lo <= 1.0 <= e.hi for e in draws])
    assert covered == pytest.approx(0.90, abs=5 * np.sqrt(0.09 / 2000))


@pytest.mark.parametrize("n", range(MIN_PAIRS))
def test_too_few_pairs_have_no_interval_and_are_never_equal(n):
    assert not paired_interval([0.0] * n).decides
    assert tost([0.0] * n, 0.005).equivalent is None
    assert hedges_g([0.1] * n) is None
    assert tost_power(min(n, 1), 1e-9, 1.0) == 0


def test_ratio_does_not_depend_on_which_side_is_on_top(rng_seed):
    new, old = np.random.default_rng(rng_seed).uniform(1, 2, (2, 6))
    up, down = paired_ratio(new, old), paired_ratio(old, new)
    assert (up.value, up.lo, up.hi) == pytest.approx((1 / down.value, 1 / down.hi, 1 / down.lo))
    scaled = paired_ratio(1000 * new, 1000 * old)
    assert scaled.lo == pytest.approx(up.lo)


def test_tost_is_the_interval_inside_the_margin(rng_seed):
    rng = np.random.default_rng(rng_seed)
    outcomes = set()
    for _ in range(200):
        d, margin = rng.normal(rng.normal(0, 0.5), 0.5, rng.integers(3, 9)), rng.uniform(0.2, 2)
        result = tost(d, margin)
        assert result.equivalent == (-margin < result.difference.lo and result.difference.hi < margin)
        outcomes.add(result.equivalent)
    assert outcomes == {True, False}


def test_tost_errs_at_most_alpha_at_the_margin(rng_seed):
    draws = np.random.default_rng(rng_seed).normal(1.0, 0.4, (2000, 5))
    claimed = np.mean([tost(d, 1.0).equivalent for d in draws])
    assert claimed < 0.05 + 5 * np.sqrt(0.05 * 0.95 / 2000)


def test_tost_refuses_a_margin_that_is_none():
    for margin in (0.0, -0.1):
        with pytest.raises(UserError, match="positive"): tost([0.1, 0.2, 0.3], margin)


def test_no_spread_needs_no_luck():
    assert tost([0.001] * 3, 0.005).p == 0
    assert tost([0.006] * 3, 0.005).equivalent is False


def test_hedges_correction_removes_the_bias(rng_seed):
    draws = np.random.default_rng(rng_seed).normal(0.8, 1.0, (20_000, 6))
    g = np.array([hedges_g(d) for d in draws])
    naive = draws.mean(1) / draws.std(1, ddof=1)
    assert g.mean() == pytest.approx(0.8, abs=5 * g.std() / np.sqrt(len(g)))
    assert naive.mean() > 0.8 + 5 * naive.std() / np.sqrt(len(g))


@pytest.mark.parametrize("n, spread, margin, percent", [(3, 0.003, 0.005, 41), (5, 0.003, 0.005, 84), (8, 0.004, 0.005, 87)])
def test_power_figures_of_the_protocol(n, spread, margin, percent):
    assert round(100 * tost_power(n, spread, margin)) == percent


def test_power_is_that_of_the_simulated_test(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for n, shift in [(3, 0.0), (6, 0.3), (12, -0.5)]:
        draws = rng.normal(shift, 1.0, (4000, n))
        half = stats.t.ppf(0.95, n - 1) * draws.std(1, ddof=1) / np.sqrt(n)
        shown = (np.abs(draws.mean(1)) + half < 1.4).mean()
        assert shown == pytest.approx(tost_power(n, 1.0, 1.4, shift=shift), abs=5 * np.sqrt(0.25 / 4000))


def test_seeds_needed_is_the_least():
    n = seeds_needed(0.003, 0.005)
    assert tost_power(n, 0.003, 0.005) >= 0.8 > tost_power(n - 1, 0.003, 0.005)
