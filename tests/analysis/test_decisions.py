"""Words for differences: case by case, and how often they are right in simulated worlds."""

import numpy as np
import pytest

from qat.analysis.decisions import correct, decide
from qat.analysis.stats import paired_mean


@pytest.mark.parametrize(
    ("difference", "interval", "detectable", "can_move", "word"),
    [
        (3.0, [2.0, 4.0], 1.4, True, "harm"),
        (-3.0, [-4.0, -2.0], 1.4, True, "gain"),
        (0.2, [-0.5, 0.9], 0.9, True, "equivalent"),
        (0.5, [0.1, 0.9], 0.6, True, "equivalent"),  # surely there, and too small to count
        (0.9, [0.1, 1.7], 1.1, True, "harm"),
        (0.6, [-0.1, 1.3], 0.9, True, "undecided"),
        (0.6, [-0.9, 2.1], 2.1, True, "powerless"),
        (3.0, [2.0, 4.0], 1.4, False, "powerless"),
        (3.0, None, None, True, "powerless"),
    ],
)
def test_every_word_has_its_case(difference, interval, detectable, can_move, word):
    """The margin is 1."""
    assert decide(difference, interval, 1.0, detectable, can_move) == word


def test_a_family_is_corrected_by_holms_steps():
    """By hand: 4 * 0.01 = 0.04 and 3 * 0.015 = 0.045 hold at 0.05; 2 * 0.03 = 0.06 does not, and so neither does 0.04.

    What is powerless, or has no p-value, is no test and makes the family no larger.
    """
    words = {0.03: "gain", 0.01: "harm", 0.04: "harm", 0.015: "gain"}
    family = [{"p_value": p, "decision": word} for p, word in words.items()]
    others = [{"p_value": 0.001, "decision": "powerless"}, {"p_value": None, "decision": "harm"}]
    rows = [*family, *others]
    correct(rows)
    assert [row["decision"] for row in rows] == ["undecided", "harm", "undecided", "gain", "powerless", "harm"]
    rows = [{"p_value": 0.02, "word": "harm"}, {"p_value": 0.9, "word": "equivalent"}]
    correct(rows, "word")
    assert [row["word"] for row in rows] == ["harm", "equivalent"]
    rows += [{"p_value": 0.9, "word": "equivalent"}]  # another test: 3 * 0.02
    correct(rows, "word")
    assert [row["word"] for row in rows] == ["undecided", "equivalent", "equivalent"]


RIGHT = {0.0: {"equivalent", "undecided", "powerless"}, 0.5: {"equivalent", "undecided", "powerless", "harm"}}
WORLDS = 6000
SAMPLING = 2.6 * (0.05 * 0.95 / WORLDS) ** 0.5  # what a share of 95 % may fall short by in so many worlds


@pytest.mark.parametrize(("runs", "units"), [(1, 40), (3, 40), (4, 300)])
@pytest.mark.parametrize("effect", [0.0, 0.5, 2.0])
def test_words_are_right_and_intervals_cover_in_simulated_worlds(runs, units, effect):
    """A margin of 1; noise of questions and, with several runs, of runs: 95 % intervals, and 95 % of the words right.

    Without an effect a word is wrong where the interval excludes zero, in one of twenty worlds at the most. Intervals
    over few runs are wide (Student's, one degree of freedom less than there are runs) and may cover more.
    """
    rng = np.random.default_rng([runs, units, round(10 * effect)])
    covered, right = 0, 0
    for _ in range(WORLDS):
        questions = rng.normal(0, 2, units)
        of_runs = rng.normal(0, 0.25, (runs, 1)) if runs > 1 else 0.0
        mean = paired_mean(effect + questions + of_runs + rng.normal(0, 1, (runs, units)))
        low, high = mean.interval()
        covered += low <= effect <= high
        word = decide(mean.value, [low, high], 1.0, mean.detectable())
        right += word in RIGHT.get(effect, {"harm", "undecided", "powerless"})
    assert 0.93 <= covered / WORLDS <= (0.97 if runs == 1 else 0.995)
    assert right / WORLDS >= 0.95 - SAMPLING
