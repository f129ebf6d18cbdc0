"""Contrasts against SciPy's tests and by hand, and verdicts that need the whole interval."""

import math

import numpy as np
import pytest
from scipy import stats

from qat.errors import UserError
from qat.report.studies import NOT_MEASURED, claims_table
from qat.studies.contrasts import (
    CONTRADICTED,
    EQUIVALENT,
    OPEN,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Response,
    Statement,
    judge,
    with_holm,
)
from qat.studies.registration import Registered

A, B = ("a",), ("b",)
SWING = np.array([1.0, -1.0] * 5)
REGISTERED = Registered("c", "c", "s", {"": None}, "none")


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
def test_intervals_hold_where_cells_share_a_baseline_and_spread_unequally(of_baseline):
    """Four cells, two of one baseline and two of another, whose noise is in either of its cells; the last is noisier.
    No effect is planted, and 500 draws leave a share of 95 % an error of 1 %."""
    cells, rng, held = [("a",), ("b",), ("c",), ("d",)], np.random.default_rng(5), 0
    effect = dict(zip(cells, (0.5, 0.5, -0.5, -0.5), strict=True))
    for _ in range(500):
        values = {}
        for seed in range(3):
            bases = of_baseline * rng.normal(size=2)
            for number, cell in enumerate(cells):
                values[cell, seed] = np.array([bases[number // 2] + (1 + 2 * (number == 3)) * rng.normal()])
        found = Response("x", "nats", 4, values).contrast(effect)
        held += found.low < 0 < found.high
    assert 0.92 < held / 500 < 0.985


def test_where_one_seed_has_all_cells_the_noise_is_that_between_units():
    """Cell B has two seeds, A one."""
    rng = np.random.default_rng(4)
    values = {key: rng.normal(0, 1, 6) for key in ((A, 0), (B, 0), (B, 1))}
    response = Response("x", "nats", 4, values, "documents")
    difference = response.contrast({A: 1, B: -1})
    changes = values[A, 0] - values[B, 0]
    alone = stats.t.interval(0.95, 5, changes.mean(), stats.sem(changes))
    assert (difference.low, difference.high) == pytest.approx(alone) and (difference.n, difference.of) == (
        6,
        "documents",
    )
    assert response.cell(difference).endswith("] (1 of 2 seeds)")
    assert response.contrast({B: 1}).of == "seeds" and not response.fewer(response.contrast({B: 1}))
    assert "between 2 seeds (Student's, 1 d.f.), and between 6" in response.noise()
    judged = Claim(REGISTERED, [Statement("it is small", response, {A: 1, B: -1}, low=-9, high=9)]).judge()
    assert judged["verdict"] == SUPPORTED and judged["why"].endswith("Of one seed: noise between runs is not in it.")
    single = Response("x", "nats", 4, {key: row[:1] for key, row in values.items()})
    assert single.contrast({A: 1, B: -1}).low is None


def test_an_estimate_of_fewer_seeds_than_the_others_says_so():
    values = {(key, seed): np.log([0.1 + 0.01 * seed]) for key in (A, B) for seed in range(3)}
    del values[A, 1]
    response = Response("x", "%", 3, values, log=True, without=1)
    assert response.cell(response.contrast({A: 1})).endswith("] (2 of 3 seeds)")
    assert response.cell(response.contrast({B: 1})).endswith("]") and response.cell(None) == "–"
    assert response.noise().endswith("(Student's, 2 d.f.). Left out are 1 of the runs, which have no such number.")
    why = Claim(REGISTERED, [Statement("it is small", response, {A: 1}, high=0.11)]).judge()["why"]
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
    """Give three runs of one number each that agree no interval of zero: they say nothing of a fourth."""
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
    judged = Claim(REGISTERED, statements, needs).judge()
    assert judged["verdict"] == verdict and judged["why"]
    assert {each["estimate"]["level"] for each in judged["statements"]} == {0.975}
    unmet = Claim(REGISTERED, statements, needs, premises=[Statement("it falls", response, {A: 1}, high=0)]).judge()
    assert unmet["verdict"] == OPEN and unmet["why"].startswith("It was not seen that it falls (+1.0")


@pytest.mark.parametrize("seeds", [1, 4])
def test_the_detectable_difference_is_found_in_four_of_five_cases(seeds):
    """Over the documents of one seed, and over seeds. The error of a share of 2,000 draws is 1 %."""
    rng, units, level = np.random.default_rng(6), 10, 0.975
    df = seeds - 1 if seeds > 1 else units - 1
    size = stats.t.ppf((1 + level) / 2, df) + stats.t.ppf(0.8, df)  # in standard errors

    def drawn(difference: float):
        rows = rng.normal(0, 1, (seeds, 1)) if seeds > 1 else rng.normal(0, math.sqrt(units), (1, units))
        values = {(A, seed): np.resize(difference + row, units) for seed, row in enumerate(rows)}
        return Response("x", "nats", 4, values, "documents").contrast({A: 1}, level)

    error = 1 / math.sqrt(seeds)
    draws = [drawn(size * error) for _ in range(2000)]
    assert 0.76 < np.mean([draw.low > 0 for draw in draws]) < 0.84
    assert np.mean([draw.detectable**2 for draw in draws]) == pytest.approx((size * error) ** 2, rel=0.1)


def test_of_a_logarithm_a_factor_is_detectable():
    values = {(A, seed): np.log([0.1 + 0.01 * seed]) for seed in range(3)}
    response = Response("x", "%", 3, values, log=True)
    found = response.contrast({A: 1})
    assert Statement("it is small", response, {A: 1}, high=0.5).judge(0.95)["detectable"] == math.exp(found.detectable)
    alone = Response("x", "%", 3, {(A, 0): np.log([0.1])}, log=True)
    assert Statement("it is small", alone, {A: 1}, high=0.5).judge(0.95)["detectable"] is None


@pytest.mark.parametrize(
    ("value", "spread", "margin", "loss", "accuracy"),
    [
        (2.0, 0.1, 1.0, "harm", "gain"),
        (-2.0, 0.1, 1.0, "gain", "harm"),
        (0.5, 0.1, 1.0, "equivalent", "equivalent"),
        (0.5, 0.8, 1.0, "undecided", "undecided"),
        (0.5, 2.0, 1.0, "powerless", "powerless"),
        (0.5, 0.1, None, None, None),
    ],
)
def test_a_difference_with_a_margin_has_a_word(value, spread, margin, loss, accuracy):
    values = {(A, 0): value + spread * SWING}
    words = [
        Statement("x", Response("x", "", 1, values, "documents", measure=measure), {A: 1}, high=0, margin=margin)
        for measure in ("heldout_loss", "accuracy")
    ]
    assert [statement.judge(0.95)["decision"] for statement in words] == [loss, accuracy]


@pytest.mark.parametrize(
    ("needs", "spreads", "cause", "named"),
    [
        ("all", (2, 2), "powerless", "0"),
        ("all", (0.8, 2), "powerless", "1"),
        ("all", (0.8, 0.8), "undecided", "0"),
        ("any", (2, 0.8), "undecided", "1"),
        ("any", (2, 2), "powerless", "0"),
    ],
)
def test_an_open_claim_is_powerless_or_undecided_by_what_would_support_it(needs, spreads, cause, named):
    """Call a claim powerless for one such statement where it needs all, and for all of them where it needs any."""
    statements = [
        Statement(str(number), Response("x", "", 1, {(A, 0): 0.5 + spread * SWING}, "documents"), {A: 1}, -1, 1, 1.0)
        for number, spread in enumerate(spreads)
    ]
    judged = Claim(REGISTERED, statements, needs).judge()
    assert (judged["verdict"], judged["open"]) == (OPEN, cause)
    assert judged["why"].startswith(f"“{named}”") and f"; {cause}: differences from " in judged["why"]
    assert judged["why"].endswith("and 1 would count." if cause == "powerless" else "on are found.")
    premise = Claim(REGISTERED, [], needs, premises=statements[-1:]).judge()
    assert premise["open"] == ("powerless" if spreads[-1] == 2 else "undecided")


@pytest.mark.parametrize(("needs", "cause"), [("all", NOT_MEASURED), ("any", UNDECIDED)])
def test_a_claim_whose_cell_is_missing_is_not_measured_yet(needs, cause):
    """Save where it needs any of its statements, and another one is open."""
    response = Response("x", "nats", 1, {(A, 0): 0.5 + 0.8 * SWING}, "documents")
    there, missing = Statement("there", response, {A: 1}, -1, 1, 1.0), Statement("gone", response, {B: 1}, high=0)
    judged = Claim(REGISTERED, [there, missing], needs).judge()
    assert (judged["open"], judged["statements"][1]["open"]) == (cause, NOT_MEASURED)
    premise = Claim(REGISTERED, [there], premises=[missing]).judge()
    assert (premise["open"], premise["why"]) == (NOT_MEASURED, "“gone”: a cell that it needs is missing.")
    shown = [row[2].text for row in claims_table([premise, judged]).rows]
    assert shown == [NOT_MEASURED, OPEN if needs == "any" else NOT_MEASURED]


def test_a_claim_with_a_verdict_is_not_open():
    response = Response("x", "nats", 1, {(A, 0): np.array([1.0, 1.1, 0.9])}, "documents")
    assert Claim(REGISTERED, [Statement("low", response, {A: 1}, high=2)]).judge()["open"] is None
    wrong = Claim(REGISTERED, [], premises=[Statement("it falls", response, {A: 1}, high=0)]).judge()
    assert wrong["open"] == "powerless"  # nothing to be seen


def test_statements_are_about_the_measures_that_are_registered():
    response = Response("x", "nats", 1, {(A, 0): np.ones(3)}, "documents", measure="heldout_loss")
    with pytest.raises(UserError, match=r"^claims\.yaml: c: it names , the code measures heldout_loss$"):
        Claim(REGISTERED, [Statement("x", response, {A: 1}, high=2)])


@pytest.mark.parametrize(
    ("needs", "values", "verdict"),
    [
        ("all", (0.0, 0.0), EQUIVALENT),
        ("all", (0.0, -1.0), EQUIVALENT),
        ("all", (0.0, 1.0), CONTRADICTED),
        ("any", (0.0, 0.0), EQUIVALENT),
        ("any", (0.0, 1.0), EQUIVALENT),
        ("any", (0.0, -1.0), SUPPORTED),
    ],
)
def test_a_difference_inside_the_margin_is_too_small_to_count(needs, values, verdict):
    """Statements that something falls, where 0.5 would count and noise is 0.1."""
    noise = np.array([0.1, -0.1, 0.0])
    cells = {value: Response("x", "nats", 1, {(A, 0): value + noise}, "documents") for value in values}
    statements = [Statement("it falls", cells[value], {A: 1}, high=0, margin=0.5) for value in values]
    judged = Claim(REGISTERED, statements, needs).judge()
    assert judged["verdict"] == verdict and judged["open"] is None
    assert ("too little to count, where 0.5 would" in judged["why"]) == (verdict == EQUIVALENT)
