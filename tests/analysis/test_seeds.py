"""The seeds' table: the noise between seeds beside one run's own."""

import itertools
import math
from pathlib import Path

import pytest
from scipy.stats import t

from qat.report import tables, uncertainty
from qat.report.caveats import caveats, lead
from qat.report.experiment import Experiment, distinct, published
from qat.report.page import write_report
from qat.runs.folder import Run
from tests.helpers.page import Page
from tests.helpers.synthetic_runs import HIF8, PTQ, compared_pair, config, edit, pretrained_beside, write_run


@pytest.fixture
def three(tmp_path) -> Experiment:
    """Three seeds, each with its PTQ, over one pretrained checkpoint. The documents change by 0, 0.1 and 0.2, and a
    seed changes all of them by 0, 0.1 or 0.2 more; no answer changes."""
    runs, baselines = [], []
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        text = {"wikipedia": [3.0, 3.2, 3.4]}
        answers = {"arc_easy": [True] * 60 + [False] * 40, "mmlu": [True] * 30 + [False] * 70}
        of = {"seed": seed}
        ptq = {"wikipedia": [value + 0.5 for value in text["wikipedia"]]}
        scored = {"bf16": answers, PTQ: answers}, {"bf16": text, PTQ: ptq}
        baselines.append(write_run(tmp_path / f"base{seed}", config(**of), [2.0], *scored))
        start = {"wikipedia": [value + 1 for value in text["wikipedia"]]}
        write_run(pretrained_beside(baselines[-1]), config(**of), [], {"bf16": answers}, {"bf16": start})
        ours = {
            "wikipedia": [value + shift + bump for value, bump in zip(text["wikipedia"], (0, 0.1, 0.2), strict=True)]
        }
        answers = dict.fromkeys(("bf16", "w8a8"), answers)
        texts = {"bf16": text, "w8a8": ours}
        runs.append(write_run(tmp_path / f"run{seed}", config(**HIF8, **of), [2.0 + shift], answers, texts))
    return Experiment("exp8", [Run(run) for run in runs], [Run(base) for base in baselines])


def named_apart(pairs: list[tuple[Path, Path]]) -> list[list[Run]]:
    """The runs and the baselines of pairs of folders, numbered."""
    return [
        [Run(folder.rename(folder.with_name(f"{folder.name}-{i}"))) for i, folder in enumerate(side)]
        for side in zip(*pairs, strict=True)
    ]


def test_the_noise_between_seeds_stands_beside_one_runs_own(three, tmp_path):
    rows = [[str(cell) for cell in row] for row in uncertainty.seeds([three]).rows]
    # Over seeds: 0.1, 0.2, 0.3, so +-t(2) * 0.1 / sqrt(3); one run: 0, 0.1, 0.2 over its sequences, which is the same.
    half = t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert [row[:3] for row in rows] == [
        ["exp8", "W8A8", "3"], ["", "W8A8 by PTQ", "3"], ["", "BF16 weights", "3"], ["", "pretrained checkpoint", "3"],
    ]  # fmt: skip
    cells, ptq, bf16, pretrained = (row[3:] for row in rows)
    assert cells[0].startswith("5.000 [") and [ptq[0], bf16[0], pretrained[0]] == [""] * 3
    assert cells[1] == f"+0.2000 [{0.2 - half:+.4f}, {0.2 + half:+.4f}]" and cells[2] == f"{half:.4f}"
    assert cells[3] == "+0.00 [-]" and float(cells[4]) > 0  # seeds that agree are no certainty
    assert ptq[1] == "+0.5000 [-]" and bf16[1].startswith("+0.0000")
    assert pretrained[1] == "+1.0000 [-]" and (pretrained[2], pretrained[4]) == ("–", "–")
    html, markdown = write_report([three], tmp_path / "out")
    assert "The noise between seeds" in Page(html).text and cells[1] in markdown.read_text()


def test_several_seeds_are_one_row_with_the_noise_of_seeds_and_documents(three):
    """Documents change by 0, 0.1 and 0.2, seeds by 0, 0.1 and 0.2 more, without interaction."""
    (recipe,) = three.recipes
    held, ptq = (next(row for row in recipe.comparison["heldout"] if row["mode"] == mode) for mode in ("w8a8", "ptq"))
    # Satterthwaite's four degrees of freedom would make less of both together than either has alone, on two.
    half = t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert half > t.ppf(0.975, 4) * 0.1 * math.sqrt(2 / 3)
    assert held["difference"] == pytest.approx(0.2) and held["ci"] == pytest.approx([0.2 - half, 0.2 + half])
    assert ptq["ci"] == pytest.approx([0.5, 0.5]) and held["pretrained"] - held["baseline"] == pytest.approx(1)
    assert held["kl"] == pytest.approx(0.0021, abs=5e-5)
    ape, half = recipe.comparison["loss"], t.ppf(0.975, 2) * 5 / math.sqrt(3)
    assert ape["ape"] == pytest.approx(5) and ape["ci"] == pytest.approx([0, 5 + half])  # 0, 5 and 10 %, none below 0
    for row in (row for row in recipe.comparison["tasks"] if row["mode"] == "w8a8"):
        n = row["n"]  # no flip in any seed, and no certainty
        half = 100 * t.ppf(0.975, n + 1) * math.sqrt(2 / (n + 1) / (n + 2))
        assert row["points"] == 0 and row["ci"] == pytest.approx([-half, half])


def test_what_qat_does_to_weights_and_scales_has_the_noise_of_seeds_and_documents(three, tmp_path):
    """Under PTQ's scales each document has half of what it has under the run's own."""
    for run, base in zip(three.runs, three.baselines, strict=True):
        own, plain = (each.evaluations()["quick"] for each in (run, base))
        own, plain = own["w8a8"]["heldout"]["wikipedia"], plain["bf16"]["heldout"]["wikipedia"]
        losses = [(a + b) / 2 for a, b in zip(own["document_losses"], plain["document_losses"], strict=True)]
        text = {**own, "document_losses": losses, "loss": sum(losses) / 3}
        mixed = {"qat_weights_ptq_scales": {"sequences": 16, "heldout": {"wikipedia": text}}}
        edit(run.path / "eval.json", lambda each, mixed=mixed: each["quick"]["w8a8"].update(mixed))
    (recipe,) = distinct([three]).values()
    (qat,) = recipe.comparison["qat"]
    half = t.ppf(0.975, 2) * 0.1 / math.sqrt(3) / 2
    for part, difference in (("weights", -0.4), ("scales", 0.1)):
        assert qat[part]["difference"] == pytest.approx(difference)
        assert qat[part]["ci"] == pytest.approx([difference - half, difference + half])
    edit(three.runs[1].path / "eval.json", lambda each: each["quick"]["w8a8"].update(qat_weights_ptq_scales=None))
    again = Experiment("exp8", three.runs, three.baselines)
    (recipe,) = distinct([again]).values()
    assert recipe.comparison["qat"][0].keys().isdisjoint(("weights", "scales"))


def test_the_verdict_counts_recipes_and_the_table_beside_the_paper_has_a_row_a_mode(three):
    text = " ".join(lead([three])["sentences"])
    assert "threshold in 0 of 1 recipes, of 3 compared runs (5.00 %); 1 of their intervals over seeds" in text
    assert "intervals over seeds spans it." in text
    assert "none of 6 tests (Student's over seeds and questions; 5 %, Holm's" in text
    assert "differs from BF16 by +0.2000 nats a token; 0 of 1 intervals" in text
    rows = [str(row[1]) for row in tables.summary([three], published()).rows]
    assert rows == ["paper", "ours, W8A8", "ours, W8A8 by PTQ", "ours, BF16 weights", "ours, pretrained"]


def test_seeds_that_were_scored_in_different_ways_have_no_mean(tmp_path):
    pairs = [compared_pair(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for folder in pairs[1]:
        edit(folder / "eval.json", lambda record: [mode.update(lm_eval="9") for mode in record["quick"].values()])
    experiment = Experiment("exp8", *named_apart(pairs))
    _, markdown = write_report([experiment], tmp_path / "out")
    assert all(pair.comparison for pair in experiment.pairs) and not experiment.recipes[0].comparison
    text = markdown.read_text()
    assert "> lm-eval version differs: 9 in base-1" in text and "> Not compared: exp8." in text
    assert "The noise between seeds" not in text


def test_a_run_that_is_named_twice_is_not_two_seeds(tmp_path):
    experiment = Experiment("exp8", *named_apart([compared_pair(tmp_path / str(number)) for number in (0, 1)]))
    (recipe,) = experiment.recipes
    assert len(recipe.compared) == 2 and recipe.comparison is None
    assert recipe.missing == "exp8 has a seed twice (run-0, run-1), so there is no mean over seeds; leave one out"


def test_where_one_of_several_seeds_is_compared_it_is_named_and_so_is_what_it_lacks(three):
    for run in three.runs[1:]:
        (run.path / "eval.json").unlink()
    again = [Experiment("exp8", three.runs, three.baselines)]
    assert [recipe.label for recipe in again[0].recipes if recipe.comparison] == ["exp8 seed 0"]
    assert any(line.startswith("One seed a cell: intervals cover") for line in caveats(again))
    assert lead(again)["open"] == ["Not compared: exp8 seed 1, exp8 seed 2."]


def test_seeds_that_were_never_run_are_not_passed_over(three, tmp_path):
    runs = [*three.runs[:1], Run(tmp_path / "not-there")]
    unfinished = [Experiment("exp8", runs, three.baselines[:1])]
    assert lead(unfinished)["open"] == ["Not compared: exp8 (1 of 2 runs missing)."]


def test_scores_by_unlike_machines_are_told_of(three):
    for by, run in zip(("a GPU", "a CPU"), (three.runs[0], three.baselines[0]), strict=True):
        scored = {"scored_on": by}
        edit(run.path / "eval.json", lambda record, by=scored: [mode.update(by) for mode in record["quick"].values()])
    lines = "\n".join(caveats([Experiment("exp8", three.runs, three.baselines)]))
    assert "were scored by unlike machines or versions (a CPU; a GPU), whose sums" in lines


def test_a_task_at_chance_in_some_baselines_is_named_with_them(tmp_path):
    at_chance, above = [True] * 10 + [False] * 30, [True] * 30 + [False] * 10
    scores = {0: at_chance, 1: above}
    pairs = [compared_pair(tmp_path / str(seed), {"arc_easy": right}, seed=seed) for seed, right in scores.items()]
    experiment = Experiment("exp8", *named_apart(pairs))
    lines = "\n".join(caveats([experiment]))
    assert "ARC-Easy in BF16 seed 0 alone, 25.0 % of 40 questions, cannot be told from chance" in lines
    assert not experiment.recipes[0].comparison["tasks"][0]["near_chance"]  # half of them right in the mean


def test_one_question_and_several_seeds_have_the_widest_interval(tmp_path):
    pairs = [compared_pair(tmp_path / str(seed), {"arc_easy": [True]}, seed=seed) for seed in (0, 1)]
    experiment = Experiment("exp8", *named_apart(pairs))
    row = experiment.recipes[0].comparison["tasks"][0]
    assert row["ci"] == [-100, 100] and row["p_value"] == 1


def test_seeds_of_recipes_that_differ_in_anything_are_told_apart(tmp_path):
    cases = enumerate(itertools.product((0, 1), ("clip", "inf")))
    pairs = [
        compared_pair(tmp_path / str(number), **{"seed": seed, "quant.overflow": overflow})
        for number, (seed, overflow) in cases
    ]
    rows = uncertainty.seeds([Experiment("mine", *named_apart(pairs))]).rows
    assert [str(row[0]) for row in rows if str(row[0])] == ["mine overflow clip", "mine overflow inf"]
