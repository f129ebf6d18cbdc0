"""The statistics of paired answers and losses, against SciPy, statsmodels and counting."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp
from statsmodels.stats.multitest import multipletests

from qat.analysis.stats import (
    above_chance,
    crossed,
    detectable,
    holm,
    mcnemar,
    over_steps,
    paired_mean,
    student,
    tang,
    tango,
)


def test_mcnemar_is_the_binomial_test_of_the_flips():
    assert mcnemar(0, 0) == 1
    for lost in (0, 1, 4, 11):
        for gained in (1, 4, 5, 20, 39):
            assert mcnemar(lost, gained) == pytest.approx(binomtest(lost, lost + gained).pvalue)
    assert mcnemar(3000, 3200) == pytest.approx(binomtest(3000, 6200).pvalue)


@pytest.mark.parametrize(("lost", "gained", "n"), [(9, 1, 100), (1, 0, 44), (30, 41, 1172), (0, 5, 200), (7, 7, 50)])
def test_tango_inverts_the_score_test(lost, gained, n):
    """At either limit the score statistic is 1.96 for the most likely rates, found here by brute force: statsmodels has
    no interval for the difference of paired proportions."""
    share = np.linspace(0, 1, 200_001)[1:-1]  # of questions lost, under a given change
    for limit in tango(lost, gained, n):
        rates = share + limit, share, 1 - 2 * share - limit
        valid = np.all([rate > 0 for rate in rates], axis=0)
        counts = gained, lost, n - lost - gained
        likelihood = sum(k * np.log(rate[valid]) for k, rate in zip(counts, rates, strict=True))
        best = share[valid][np.argmax(likelihood)]
        statistic = (gained - lost - n * limit) / math.sqrt(n * (2 * best + limit - limit**2))
        assert abs(statistic) == pytest.approx(1.96, abs=2e-3)


def test_tango_at_the_edges():
    assert tango(0, 0, 100) == pytest.approx((-0.03699, 0.03699), abs=1e-5)  # z^2 / (n + z^2)
    assert tango(3, 8, 90) == pytest.approx([-limit for limit in tango(8, 3, 90)[::-1]])
    assert tango(10, 0, 10)[0] == -1 and tango(0, 10, 10)[1] == 1
    for lost, gained in ((1, 7), (2, 7), (3, 14), (5, 15)):  # zero is inside exactly where the score test keeps it
        low, high = tango(lost, gained, 500)
        assert (low < 0 < high) == ((gained - lost) ** 2 / (gained + lost) < 1.96**2)


@pytest.mark.parametrize(
    ("kept", "lost", "gained"), [(50, 9, 1), (43, 1, 0), (400, 30, 41), (0, 3, 5), (2, 7, 1), (9, 0, 4)]
)
def test_tang_inverts_the_score_test(kept, lost, gained):
    """As for Tango's: at either limit the statistic is 1.96 for the most likely rates, by brute force."""
    share = np.linspace(0, 1, 200_001)[1:-1]  # of questions gained, of all that either answers, under a given ratio
    for ratio in tang(kept, lost, gained):
        lost_share = 1 - ratio + ratio * share
        rates = 1 - lost_share - share, lost_share, share
        valid = np.all([rate > 0 for rate in rates], axis=0)
        counts = (kept, lost, gained)
        likelihood = sum(k * np.log(rate[valid]) for k, rate in zip(counts, rates, strict=True))
        best = np.argmax(likelihood)
        spread = ratio * sum(counts) * (lost_share[valid][best] + share[valid][best])
        assert abs(kept + gained - ratio * (kept + lost)) / math.sqrt(spread) == pytest.approx(1.96, abs=2e-3)


def test_tang_at_the_edges():
    # Before and after a transplantation, Bentur et al. 2009, as in Fagerland, Lydersen and Laake 2014.
    assert tang(1, 7, 1) == pytest.approx((0.065, 0.907), abs=5e-4)
    assert tang(100, 0, 0) == pytest.approx((100 / (100 + 1.96**2), 1 + 1.96**2 / 100), abs=1e-4)
    assert tang(40, 8, 3) == pytest.approx([1 / limit for limit in tang(40, 3, 8)[::-1]])
    assert tang(0, 0, 3) is None and tang(0, 5, 0)[0] == 0
    for lost, gained in ((1, 7), (2, 7), (3, 14), (5, 15)):  # one is inside exactly where Tango's keeps zero
        for swapped in ((lost, gained), (gained, lost)):
            (low, high), (least, most) = tang(200, *swapped), tango(*swapped, 500)
            assert (low < 1 < high) == (least < 0 < most)


@pytest.mark.parametrize(("flips", "n"), [(60, 1000), (200, 1172), (900, 14042)])
def test_a_detectable_change_is_found_in_four_of_five_samples(flips, n):
    change = detectable(flips, n)
    rates = [flips / n / 2 + change / 2, flips / n / 2 - change / 2]
    drawn = np.random.default_rng(0).multinomial(n, [*rates, 1 - sum(rates)], 4000)
    lost, gained = drawn[:, 0], drawn[:, 1]
    found = (lost - gained) ** 2 > 1.96**2 * (lost + gained)
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_what_is_detectable_at_the_edges():
    assert detectable(0, 100) > 3 / 100  # three one-way flips of a hundred are no evidence
    assert detectable(0, 3) == 1.0
    assert detectable(10, 100) > detectable(10, 1000) * 3


def test_an_interval_of_a_mean_is_scipys_t_test():
    for n in (2, 16, 400):
        values = np.random.default_rng(n).normal(0.01, 0.3, n)
        wanted = ttest_1samp(values, 0).confidence_interval(0.95)
        assert student(values).interval() == pytest.approx(wanted)


def test_more_than_chance_is_scipys_binomial_test():
    for right, n, chance in ((0, 9, 0.25), (1, 1, 0.25), (33, 100, 0.25), (9, 16, 0.25), (16, 16, 0.5)):
        wanted = binomtest(right, n, chance, alternative="greater").pvalue
        assert above_chance(right, n, chance) == pytest.approx(wanted)


def test_holm_is_that_of_statsmodels():
    draw = np.random.default_rng(0)
    assert holm([]) == []
    for size in (1, 2, 8, 56):
        p_values = draw.beta(0.2, 2, size).tolist()
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


# ------------------------------------------------------------------------------------- runs crossed with units


def test_the_mean_of_one_run_is_a_paired_t_test_and_of_several_is_crossed():
    changes = np.random.default_rng(3).normal(0.2, 1, (3, 12))
    one, test = paired_mean(changes[:1]), ttest_1samp(changes[0], 0)
    assert one.interval(0.9) == pytest.approx(list(test.confidence_interval(0.9)))
    assert one.p_value() == pytest.approx(test.pvalue)
    assert paired_mean(changes) == crossed(changes)
    assert paired_mean(changes[:, :1]) is None and paired_mean(changes[:1, :1]) is None


def test_an_interval_of_answers_ends_where_all_of_them_would_have_moved():
    assert paired_mean(np.zeros((2, 1)), reach=1.0).interval() == [-1, 1]


def test_without_any_change_by_one_of_both_ways_the_other_ones_t_test_is_left():
    """Runs that move all units alike, and units that all runs move alike."""
    rng = np.random.default_rng(0)
    runs, units = rng.normal(0.5, 1, 4), rng.normal(0.5, 1, 9)
    for moved, changes in ((runs, np.repeat(runs[:, None], 9, 1)), (units, np.repeat(units[None], 4, 0))):
        mean, test = crossed(changes), ttest_1samp(moved, 0)
        assert mean.interval(0.9) == pytest.approx(list(test.confidence_interval(0.9)))
        assert mean.p_value() == pytest.approx(test.pvalue)


@pytest.mark.parametrize(
    ("of_runs", "of_units", "of_both"),
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0.2, 1, 0.3), (1, 0.2, 1), (2, 1, 1), (5, 1, 1)],
)
def test_intervals_hold_for_further_runs_and_units_wherever_the_noise_is(of_runs, of_units, of_both):
    """Three runs and sixteen units, drawn 1,500 times about zero; a share of 95 % has an error of 0.6 %."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(1500):
        noise = of_runs * rng.normal(size=(3, 1)) / 4 + of_units * rng.normal(size=16)
        low, high = crossed(noise + of_both * rng.normal(size=(3, 16))).interval()
        held += low < 0 < high
    assert 0.938 < held / 1500 < 0.99


def test_both_ways_together_never_say_more_than_either():
    """Count the few degrees of freedom of runs, too, where these happen to lie close together."""
    rng = np.random.default_rng(2)
    for spread in (0.1, 0.3, 1.0, 3.0):
        changes = spread * rng.normal(size=(3, 1)) + rng.normal(size=16)
        found, level = crossed(changes), 0.99
        alone = [ttest_1samp(changes.mean(axis), 0) for axis in (0, 1)]
        halves = [(test.confidence_interval(level).high - test.confidence_interval(level).low) / 2 for test in alone]
        low, high = found.interval(level)
        assert (high - low) / 2 >= max(halves) * (1 - 1e-9)
        assert found.p_value() >= max(test.pvalue for test in alone) * (1 - 1e-9)


def test_answers_of_which_none_flipped_are_as_uncertain_as_one_runs():
    low, high = crossed(np.zeros((3, 60)), reach=1.0).interval()
    padded = [0.0] * 60 + [-1.0, 1.0]
    assert (low, high) == pytest.approx(tuple(ttest_1samp(padded, 0).confidence_interval()))


@pytest.mark.parametrize("steps", [40, 150])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.7])
def test_intervals_over_steps_keep_their_coverage_where_neighbours_are_alike(steps, correlation):
    """Simulate 600 autoregressive series of mean 0; Student's intervals of the same series have it in less than 0.8."""
    draw, series = np.random.default_rng(steps), np.zeros((600, steps + 50))
    for step in range(1, steps + 50):
        series[:, step] = correlation * series[:, step - 1] + draw.normal(size=600)
    covered = []
    for mean in map(over_steps, series[:, None, 50:]):
        low, high = mean.interval()
        covered.append(low < 0 < high)
    assert 0.9 < np.mean(covered) < 0.98


def test_the_noise_between_runs_counts_over_steps():
    draw = np.random.default_rng(0)
    alike = [draw.normal(0, 1, 60) for _ in range(4)]
    apart = [series + shift for series, shift in zip(alike, (-2, -1, 1, 2), strict=True)]
    (alone,), (within, _), (_, between) = (over_steps(runs).noise for runs in (alike[:1], alike, apart))
    assert within[0] < alone[0] and within[1] == 4 * alone[1]
    assert between == pytest.approx((np.std([run.mean() for run in apart], ddof=1) / 2, 3))
    assert over_steps([np.full(9, 2.0)]) is None and over_steps([np.ones(1)]) is None
