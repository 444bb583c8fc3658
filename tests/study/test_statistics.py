"Intervals, equivalence, effect size and power against SciPy and simulation."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.study.expression import Q, judge
from flashoptim_nb.study.statistics import (MIN_PAIRS, Estimate, hedges_g, paired_interval, paired_ratio, seeds_needed,
                                            tost, tost_power)


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


@pytest.mark.parametrize(
    "n, spread, margin, percent", [(3, 0.003, 0.005, 41), (5, 0.003, 0.005, 84), (8, 0.004, 0.005, 87)])
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


numbers = st.floats(-1e6, 1e6)
no_numbers = st.sampled_from([float("nan"), float("inf"), float("-inf"), None, True, "1", 10**400])


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=0, max_size=6), no_numbers, st.data())
def test_what_is_not_a_number_gives_no_result(good, bad, data):
    d = [*good, bad]
    d = data.draw(st.permutations(d))
    estimate, test = paired_interval(d), tost(d, 1e9)
    assert (estimate.value, estimate.lo, estimate.hi, estimate.decides, estimate.n) == (
        None, None, None, False, len(good))
    assert "no number in 1" in estimate.note and f"pair {d.index(bad) + 1} (" in estimate.note
    assert (test.p, test.equivalent, test.power, test.weak, test.words, test.spread, hedges_g(d)) == (
        None, None, None, False, [], None, None)
    assert paired_ratio(d, [1.0] * len(d)).value is paired_ratio([1.0] * len(d), d).value is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, -1.0])
def test_a_spread_that_is_none_has_no_power(bad):
    assert tost_power(5, bad, 1.0) is None and seeds_needed(bad, 1.0) is None
    assert tost_power(5, 1.0, bad) is None and tost_power(5, 0.0, 1.0) == 1 and tost_power(5, 0.0, 1.0, shift=1.0) == 0


@pytest.mark.parametrize("bad", [0.0, -2.0, float("nan"), None])
def test_a_ratio_is_of_positive_numbers(bad):
    for new, old in (([1.0, 2.0, bad], [1.0, 1.0, 1.0]), ([1.0, 1.0, 1.0], [1.0, bad, 1.0])):
        assert paired_ratio(new, old).value is None and "no number" in paired_ratio(new, old).note
    with pytest.raises(UserError, match="pair by pair"): paired_ratio([1.0, 2.0, 3.0], [1.0])


def test_margins_are_finite():
    for margin in (float("nan"), float("inf"), True):
        with pytest.raises(UserError, match="positive and finite"): tost([0.1, 0.2, 0.3], margin)


@settings(deadline=None, max_examples=60)
@given(st.floats(-1e3, 1e3), st.integers(1, 7), st.floats(1e-3, 1e3))
def test_differences_that_are_all_the_same(x, n, margin):
    base = np.linspace(1, 2, n)  # subtraction leaves other last digits in each
    for d in ([x] * n, list((base + x) - base) if abs(x) > 1e-3 else [x] * n):
        estimate, test = paired_interval(d), tost(d, margin, pilot=0.0)
        assert estimate.value == pytest.approx(x, abs=1e-9) and hedges_g(d) is None
        if n < MIN_PAIRS: assert (estimate.lo, test.p, test.words) == (None, None, [])
        else:
            assert estimate.lo == estimate.hi == estimate.value and test.spread == 0
            assert (test.p in (0, 1) and test.equivalent == (abs(estimate.value) < margin) and test.power == 1  # at the pilot's
                    and "no spread" in test.words)


def test_an_estimate_is_never_not_a_number():
    for value in (float("nan"), float("inf"), True):
        e = Estimate(value=value, lo=0.0, hi=1.0)
        assert (e.value, e.lo, e.decides) == (None, None, False)
        for formula in (Q("x") <= 0.5, Q("x") > 0.5): assert judge(formula, lambda q: e).status == "inconclusive"
    assert Estimate(value=1.0, lo=0.0, hi=float("nan")).ends is None
    assert paired_interval([1e308, 1.1e308, 1.2e308]).value is None
    wide = paired_ratio([1e-300, 1.0, 1e300], [1.0] * 3)
    assert 0 < wide.lo < wide.hi < float("inf")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=6), st.data(), st.sampled_from([0.90, 0.95]),
       st.sampled_from(["more", "less"]))
def test_a_lost_pair_is_worse_than_any_number(d, data, confidence, harm):
    """Whatever number the lost pairs had, the end that speaks against is no nearer to harm than without it,
    and the other side is open."""
    lost = data.draw(st.integers(1, len(d)))
    before, after = paired_interval(d, confidence), paired_interval(d[lost:], confidence, lost=lost, harm=harm)
    assert after.n == len(d) - lost and (after.value is None) == (after.n == 0)
    near, far = after.reach if harm == "more" else (-after.reach[1], -after.reach[0])
    assert far == float("inf")
    if near > -float("inf"): assert near >= (before.lo if harm == "more" else -before.hi) - 1e-9
    else: assert after.n < 2 or lost >= after.n or after.bound == "not established"
    if after.lo is not None:
        assert (after.lo, after.hi) == (
            paired_interval(d[lost:], confidence).lo, paired_interval(d[lost:], confidence).hi)
