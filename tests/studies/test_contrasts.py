"""Contrasts against SciPy's tests and by hand, and verdicts that need the whole interval."""

import math

import numpy as np
import pytest
from scipy import stats

from qat.studies.contrasts import CONTRADICTED, OPEN, SUPPORTED, Claim, Response, Statement, judge, with_holm

A, B = ("a",), ("b",)


def test_a_contrast_over_sequences_is_a_paired_t_test():
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, 12)
    values = {(A, 0): common + rng.normal(0.1, 0.05, 12), (B, 0): common + rng.normal(0, 0.05, 12)}
    found = Response("x", "nats", 4, values, "documents").contrast({A: 1, B: -1}, 0.9)
    test = stats.ttest_rel(values[A, 0], values[B, 0])
    low, high = test.confidence_interval(0.9)
    assert (found.value, found.low, found.high, found.p) == pytest.approx(
        (np.mean(values[A, 0] - values[B, 0]), low, high, test.pvalue)
    )
    assert (found.n, found.of) == (12, "documents")


def test_a_contrast_over_seeds_of_two_cells_is_a_paired_t_test():
    """Units that are alike have no noise of their own."""
    rng = np.random.default_rng(1)
    values = {(key, seed): np.full(8, rng.normal(seed, 1)) for key in (A, B) for seed in range(4)}
    found = Response("x", "nats", 4, values, "documents").contrast({A: 1, B: -1})
    means = {key: [values[key, seed].mean() for seed in range(4)] for key in (A, B)}
    test = stats.ttest_rel(means[A], means[B])
    low, high = test.confidence_interval()
    assert (found.value, found.low, found.high, found.p) == pytest.approx(
        (np.subtract(means[A], means[B]).mean(), low, high, test.pvalue)
    )
    assert (found.n, found.of) == (4, "seeds")


def test_what_seeds_share_is_noise_of_a_cell_and_not_of_a_difference():
    """Both cells are shifted alike by the seed: that moves either of them, and cancels between them."""
    values = {(key, seed): np.full(8, seed + 0.1 * (key == A)) for key in (A, B) for seed in range(4)}
    response = Response("x", "nats", 4, values, "documents")
    difference, cell = response.contrast({A: 1, B: -1}), response.contrast({A: 1})
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
    test = stats.ttest_1samp([seed + 0.1 for seed in range(4)], 0)
    assert (cell.low, cell.high, cell.p) == pytest.approx((*test.confidence_interval(), test.pvalue))


def test_over_seeds_that_agree_the_noise_is_that_of_the_units():
    rng = np.random.default_rng(1)
    units = {A: rng.normal(0.1, 1, 12), B: rng.normal(0, 1, 12)}
    values = {(key, seed): units[key] for key in (A, B) for seed in range(3)}
    found = Response("x", "nats", 4, values, "documents").contrast({A: 1, B: -1}, 0.9)
    test = stats.ttest_rel(units[A], units[B])
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.9)))


@pytest.mark.parametrize("lost", [0, 9])
def test_answers_that_seeds_change_alike_are_no_certainty(lost):
    """Sixty questions, three seeds, the same flips or none: no more is known than of one seed."""
    flips = np.where(np.arange(60) < lost, -100.0, 0.0)
    once, thrice = (
        Response("x", "points", 2, dict.fromkeys([(A, seed) for seed in range(seeds)], flips), "questions")
        for seeds in (1, 3)
    )
    once, thrice = once.contrast({A: 1}), thrice.contrast({A: 1})
    assert (thrice.value, thrice.low, thrice.high) == pytest.approx((once.value, once.low, once.high))
    assert thrice.p == pytest.approx(once.p) and thrice.low < -3


@pytest.mark.parametrize("shared_by_seeds", [0.2, 1.0])
def test_seeds_and_documents_are_both_in_a_difference(shared_by_seeds):
    """The noise between seeds and between documents: their variances, less that of what both have; but at the least
    what the seeds alone say, on their two degrees of freedom."""
    rng = np.random.default_rng(3)
    shared = shared_by_seeds * rng.normal(0, 1, 10)
    values = {(k, s): shared * (k == A) + rng.normal(0, 0.5) + rng.normal(0, 0.2, 10) for k in (A, B) for s in range(3)}
    found = Response("x", "nats", 4, values, "documents").contrast({A: 1, B: -1})
    changes = np.array([values[A, s] - values[B, s] for s in range(3)])
    runs, units = changes.mean(1).var(ddof=1) / 3, changes.mean(0).var(ddof=1) / 10
    rest = changes - changes.mean(1, keepdims=True) - changes.mean(0) + changes.mean()
    error = math.sqrt(runs + units - (rest**2).sum() / 18 / 30)
    both = stats.t.ppf(0.975, error**4 / (runs**2 / 2 + units**2 / 9)) * error
    alone = stats.t.ppf(0.975, 2) * math.sqrt(runs)
    assert (alone > both) == (shared_by_seeds == 0.2)
    half = max(alone, both)
    assert found.value == pytest.approx(changes.mean())
    assert (found.low, found.high) == pytest.approx((changes.mean() - half, changes.mean() + half))


@pytest.mark.parametrize("of_baseline", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("sampled", ["documents", ""])
def test_intervals_hold_where_cells_share_a_baseline_and_spread_unequally(of_baseline, sampled):
    """Four cells, two of one baseline and two of another, whose noise is in either of its cells; the last is noisier.
    No effect is planted, and 500 draws leave a share of 95 % an error of 1 %."""
    cells, rng, held = [("a",), ("b",), ("c",), ("d",)], np.random.default_rng(5), 0
    effect = dict(zip(cells, (0.5, 0.5, -0.5, -0.5), strict=True))
    units = 12 if sampled else 1
    for _ in range(500):
        values = {}
        for seed in range(3):
            bases = of_baseline * rng.normal(size=2)
            for number, cell in enumerate(cells):
                run = bases[number // 2] + (1 + 2 * (number == 3)) * rng.normal()
                values[cell, seed] = run + (rng.normal(size=units) if sampled else np.zeros(1))
        found = Response("x", "nats", 4, values, sampled).contrast(effect)
        held += found.low < 0 < found.high
    assert 0.92 < held / 500 < 0.985


def test_seeds_that_lack_a_cell_leave_no_interval_of_what_seeds_share():
    """Cell B has two seeds, A one: B has an interval, and their difference and A alone have none."""
    rng = np.random.default_rng(4)
    values = {key: rng.normal(0, 1, 6) for key in ((A, 0), (B, 0), (B, 1))}
    response = Response("x", "nats", 4, values, "documents")
    assert response.contrast({A: 1}).low is None and response.contrast({A: 0.5, B: 0.5}).low is None
    assert (
        response.contrast({B: 1}).low is not None
        and "between 2 seeds (Student's, 1 d.f.), and between 6" in response.noise()
    )


def test_an_estimate_of_fewer_seeds_than_the_others_says_so():
    values = {(key, seed): np.log([0.1 + 0.01 * seed]) for key in (A, B) for seed in range(3)}
    del values[A, 1]
    response = Response("x", "%", 3, values, log=True, without=1)
    assert response.cell(response.contrast({A: 1})).endswith("] (2 of 3 seeds)")
    assert response.cell(response.contrast({B: 1})).endswith("]") and response.cell(None) == "–"
    assert response.noise().endswith("(Student's, 2 d.f.). Left out are 1 of the runs, which have no such number.")
    why = Claim("c", "s", [Statement("it is small", response, {A: 1}, high=0.11)]).judge()["why"]
    assert "] % (2 of 3 seeds), an interval that" in why
    assert Response("x", "%", 3, {}, without=3).noise() == (
        "Nothing was measured. Left out are 3 of the runs, which have no such number."
    )


def test_few_answers_that_differ_are_not_taken_for_certainty():
    """By hand: Bonett and Price's interval, with Student's quantile."""
    n, lost = 100, 3
    flips = np.where(np.arange(n) < lost, -100.0, 0.0)
    found = Response("x", "points", 2, {(A, 0): flips}, "questions").contrast({A: 1})
    one, other = (lost + 1) / (n + 2), 1 / (n + 2)
    error = math.sqrt((one + other - (other - one) ** 2) / (n + 1))
    half = 100 * stats.t.ppf(0.975, n + 1) * error
    assert found.value == -3 and found.n == n
    assert (found.low, found.high) == pytest.approx((100 * (other - one) - half, 100 * (other - one) + half))
    none = Response("x", "points", 2, {(A, 0): np.zeros(1)}, "questions").contrast({A: 1})
    assert (none.value, none.low, none.high) == (0, -100, 100)  # and no further


def test_a_missing_cell_leaves_only_what_needs_it_without_an_estimate():
    response = Response("x", "nats", 4, {(A, 0): np.arange(3.0)}, "documents")
    assert response.contrast({A: 1, B: -1}) is None and response.contrast({A: 1, B: 0}).value == 1
    assert response.text(None) == "–"


def test_one_seed_and_one_number_a_run_have_estimates_and_no_intervals():
    response = Response("x", "%", 3, {(A, 0): np.log([0.2]), (B, 0): np.log([0.1])}, log=True)
    found = response.contrast({A: 1, B: -1})
    assert math.exp(found.value) == pytest.approx(2) and found.low is None
    assert response.text(found) == "2.000 [-]" and "no intervals" in response.noise()
    assert judge(found, -1, 1) == OPEN


def test_seeds_that_agree_are_no_certainty():
    """Of one number a run, in three runs: that they do not differ says nothing of a fourth."""
    response = Response(
        "x", "points", 2, {(key, seed): np.array([0.1 * (key == A)]) for key in (A, B) for seed in range(3)}
    )
    found = response.contrast({A: 1, B: -1})
    assert found.value == pytest.approx(0.1) and found.low is found.p is None and judge(found, 0, 1) == OPEN


def test_holm_agrees_with_a_calculation_by_hand():
    made = [
        Response("x", "", 1, {(A, 0): np.array(v)}, "documents").contrast({A: 1}) for v in ([1, 1.1, 0.9], [1, 3, 2])
    ]
    p = [estimate.p for estimate in made]
    rows = with_holm(Response("x", "", 1, {}), [made[1], None, made[0]])
    assert [row["p_holm"] for row in rows] == [pytest.approx(max(p[1], 2 * p[0])), None, pytest.approx(2 * p[0])]


def test_a_verdict_needs_the_whole_interval():
    estimate = Response("x", "", 1, {(A, 0): np.array([1.0, 1.2, 0.8])}, "documents").contrast({A: 1})
    assert 0.4 < estimate.low < 0.6 < 1.4 < estimate.high < 1.6
    assert [judge(estimate, *ends) for ends in ((0, 2), (0, 1), (2, 3), (-3, 0.1))] == [
        SUPPORTED, OPEN, CONTRADICTED, CONTRADICTED,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "highs", "verdict"),
    [
        ("all", (2, 2), SUPPORTED),
        ("all", (2, 1), OPEN),
        ("all", (2, 0.1), CONTRADICTED),
        ("any", (2, 0.1), SUPPORTED),
        ("any", (1, 0.1), OPEN),
        ("any", (0.1, 0.1), CONTRADICTED),
    ],
)
def test_a_claim_rests_on_all_or_any_of_its_statements(needs, highs, verdict):
    response = Response("x", "nats", 1, {(A, 0): np.array([1.0, 1.1, 0.9])}, "documents")
    statements = [Statement(f"below {high}", response, {A: 1}, high=high) for high in highs]
    judged = Claim("c", "s", statements, needs).judge()
    assert judged["verdict"] == verdict and judged["why"]
    assert {each["estimate"]["level"] for each in judged["statements"]} == {0.975}
    unmet = Claim("c", "s", statements, needs, premises=[Statement("it falls", response, {A: 1}, high=0)]).judge()
    assert unmet["verdict"] == OPEN and unmet["why"].startswith("It was not seen that it falls (+1.0")
