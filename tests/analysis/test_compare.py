"""The comparison: its arithmetic by hand, and everything it must refuse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from qat.analysis.compare import loss_ape, mismatches
from qat.analysis.stats import holm, student
from qat.errors import UserError
from qat.report.text import heldout_verdict, remark, table, verdict
from qat.runs.folder import Run
from tests.helpers.synthetic_runs import HIF8, RIGHT, TEXT, compare, config, edit, flipped, lossy_pair, write_run


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    return lossy_pair(tmp_path)


def test_loss_ape_by_hand():
    assert loss_ape([2.0, 3.0], [2.5, 2.0]) == pytest.approx((20 + 50) / 2)
    assert loss_ape(np.array([4.0]), np.array([4.0])) == 0


@pytest.mark.parametrize(
    ("quantized", "baseline", "says"),
    [
        ([1.0], [1.0, 2.0], "the run has 1, the baseline 2"),
        ([], [], "at least one step"),
        ([1.0, math.nan], [1.0, 1.0], "entry 2 is nan"),
        ([1.0], [math.inf], "entry 1"),
        ([1.0], [0.0], "entry 1"),
    ],
)
def test_loss_ape_refuses(quantized, baseline, says):
    with pytest.raises(UserError, match=says):
        loss_ape(quantized, baseline)


def test_configurations_that_lack_what_the_other_has_are_told_apart(tmp_path):
    changes = ({}, {"model.source": "random", "model.architecture": {"vocab_size": 64}})
    ours, theirs = (Run(write_run(tmp_path / str(i), config(**c))).typed_config() for i, c in enumerate(changes))
    assert mismatches(ours, theirs)["model.architecture.vocab_size"] == (None, 64)


def test_compare_by_hand(runs):
    result = compare(*runs, "quick")
    assert json.loads(json.dumps(result)) == result
    assert [result[key] for key in ("run", "baseline", "benchmark", "seeds")] == ["run", "base", "quick", 1]
    assert result["loss"] == {
        "steps": 2,
        "skipped": 0,
        "ape": pytest.approx(35),
        "largest": 1.0,
        "ape_last_tenth": pytest.approx(50),
        "final": 3.0,
        "final_baseline": 2.0,
        "passes": False,
    }
    w8a8, bf16 = result["tasks"]
    assert (w8a8["task"], w8a8["mode"], bf16["mode"]) == ("arc_easy", "w8a8", "bf16")
    assert (w8a8["lost"], w8a8["gained"], w8a8["n"], w8a8["passes"], w8a8["near_chance"]) == (9, 1, 100, False, False)
    assert (w8a8["baseline"], w8a8["score"], w8a8["points"]) == pytest.approx((60, 52, -8))
    assert w8a8["relative_drop"] == pytest.approx(100 * 8 / 60)
    assert w8a8["p_value"] == pytest.approx(binomtest(1, 10).pvalue)
    assert w8a8["ci"][0] < -8 < w8a8["ci"][1]
    assert (bf16["points"], bf16["p_value"], bf16["passes"]) == (0, 1, True)
    heldout = result["heldout"][0]
    assert (heldout["loss"], heldout["baseline"], heldout["difference"]) == pytest.approx((3.3, 3.2, 0.1))
    assert heldout["kl"] == 0.0021
    assert heldout["ci"] == pytest.approx(student(np.array([0.1, 0.2, 0.0])).interval())


def test_pretrained_scores_stand_beside(runs, tmp_path):
    answers = {"bf16": {"arc_easy": [True] * 70 + [False] * 30}}
    pretrained = write_run(tmp_path / "start", config(**{"budget.steps": 0}), [], answers, TEXT)
    assert [row["pretrained"] for row in compare(*runs, "quick", pretrained)["tasks"]] == [70, 70]
    edit(pretrained / "eval.json", lambda record: record["quick"]["bf16"].update(lm_eval="old"))
    with pytest.raises(UserError, match="lm-eval version differs: old in start"):
        compare(*runs, "quick", pretrained)


def test_near_chance_and_a_baseline_of_zero(tmp_path):
    """A binomial test: 33 of 100 are more than a quarter at p = 0.045, 32 at 0.069."""
    for right, near, passes in ((32, True, True), (33, False, True), (0, True, None)):
        answers = [True] * right + [False] * (100 - right)
        baseline = write_run(tmp_path / f"base{right}", config(), [2.0], {"bf16": {"mmlu": answers}})
        both = {"bf16": {"mmlu": answers}, "w8a8": {"mmlu": answers}}
        row = compare(write_run(tmp_path / f"run{right}", config(**HIF8), [2.0], both), baseline, "quick")["tasks"][0]
        assert (row["near_chance"], row["passes"]) == (near, passes)


def test_what_changes_no_number_may_differ(runs):
    changes = {"budget.checkpoint_every": 7, "logger.name": "wandb", "benchmark.name": "paper"}
    (runs[1] / "config.yaml").write_text(json.dumps(config(experiment="exp1", **changes)))
    assert compare(*runs, "quick")["baseline"] == "base"


def test_scores_of_weights_that_were_trained_again_are_refused(runs):
    """A checkpoint that was deleted comes back by training, on a GPU with other losses."""
    assert compare(*runs, "quick")["run"] == "run"
    edit(runs[1] / "metrics.jsonl", lambda row: row.update(loss=row["loss"] + 0.01))
    with pytest.raises(UserError, match="base was scored, but has been trained again since, to other losses; score it"):
        compare(*runs, "quick")
    new = Run(runs[1]).fingerprint
    edit(runs[1] / "eval.json", lambda found: [each.update(weights=[new]) for each in found["quick"].values()])
    with pytest.raises(UserError, match="run was scored, but beside a baseline of other losses than base's; score it"):
        compare(*runs, "quick")


@pytest.mark.parametrize(("place", "says"), [(0, "trained again since"), (1, "beside a baseline of other losses")])
def test_scores_that_do_not_name_their_weights_are_refused(runs, place, says):
    edit(runs[0] / "eval.json", in_eval(weights=[Run(path).fingerprint for path in runs][:place]))
    with pytest.raises(UserError, match=f"run was scored, but .*{says}"):
        compare(*runs, "quick")


def test_scores_say_what_computed_them(runs):
    assert compare(*runs, "quick")["scored_on"] == []
    for path, by in zip(runs, ("a GPU", "a CPU"), strict=True):
        edit(path / "eval.json", lambda found, by=by: [each.update(scored_on=by) for each in found["quick"].values()])
    assert compare(*runs, "quick")["scored_on"] == ["a CPU", "a GPU"]


def in_eval(**changes):
    return lambda record: record["quick"]["w8a8"].update(changes)


def in_task(**changes):
    return lambda record: record["quick"]["w8a8"]["tasks"]["arc_easy"].update(changes)


def in_text(**changes):
    return lambda record: record["quick"]["w8a8"]["heldout"]["wikipedia"].update(changes)


SAMPLES = "samples/quick/w8a8/arc_easy.jsonl"


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("eval.json", in_eval(lm_eval="0.5"), "lm-eval version differs: 0.5 in run, 0.4.13 in base"),
        ("eval.json", in_eval(tasks={}), r"tasks differs: \[\] in run"),
        ("eval.json", in_eval(heldout={}), "held-out texts differs"),
        ("eval.json", in_task(task_hash="x"), "arc_easy task_hash differs: x in run, h-arc_easy in base"),
        ("eval.json", in_task(shots=25), "arc_easy shots differs"),
        ("eval.json", in_task(version=2), "arc_easy version differs"),
        ("eval.json", in_task(n=99), "arc_easy n differs"),
        ("eval.json", in_task(score=0.9), "52 of 100 right, eval.json says 0.9000 of 100; redo it: python scripts/e"),
        ("eval.json", in_text(text_hash="x"), "held-out wikipedia text_hash differs"),
        ("eval.json", in_text(document_losses=[3.0]), "held-out wikipedia documents differs: 1 in run, 3 in base"),
        ("eval.json", lambda r: r["quick"].pop("w8a8"), "no quick evaluation in mode w8a8; make it: python .*/run "),
        ("eval.json", lambda r: r.pop("quick"), "no quick evaluation in mode w8a8"),
        (SAMPLES, lambda r: r.update(doc_hash=r["doc_hash"].replace("d7", "x")), "question 8 doc_hash differs: x"),
        (SAMPLES, lambda r: r.update(prompt_hash="x"), "arc_easy question 1 prompt_hash differs"),
        ("status.json", lambda r: r.update(state="running"), "run is running at step 2 of 36; finish it: python scr"),
        ("status.json", lambda r: r.update(state="failed", reason="no disk"), r"failed at step 2 of 36 \(no disk\)"),
        ("metrics.jsonl", lambda r: r.update(step=r["step"] + 1), "record different steps"),
        ("metrics.jsonl", lambda r: r.update(loss=math.nan), "loss APE is undefined"),
    ],
)
def test_unlike_runs_are_refused(runs, file, change, says):
    edit(runs[0] / file, change)
    with pytest.raises(UserError, match=says) as error:
        compare(*runs, "quick")
    assert "\n" not in str(error.value)


def test_another_order_of_questions_is_refused(runs):
    samples = runs[0] / SAMPLES
    samples.write_text("".join(reversed(samples.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="question 1 doc_hash differs: d99 in run, d0 in base"):
        compare(*runs, "quick")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim.lr": 1e-4}, "no matched baseline of run: optim.lr=0.0001 there, optim.lr=1e-05 here"),
        ({"seed": 3}, "seed=3 there, seed=0 here"),
        ({"data.label_shift": "twice"}, "data.label_shift=twice there, data.label_shift=once here"),
        ({"budget.steps_factor": 0.5}, "budget.steps=18 there, budget.steps=36 here"),
        ({"data.source": "hub", "data.path": "a/b"}, "data.source=hub there, data.source=package here"),
        (HIF8, "base is not a BF16 baseline: quant.format=hif8"),
    ],
)
def test_an_unmatched_baseline_is_refused(runs, changes, says):
    (runs[1] / "config.yaml").write_text(json.dumps(config(**changes)))
    with pytest.raises(UserError, match=says):
        compare(*runs, "quick")


def test_only_quantized_runs_that_exist_are_compared(runs, tmp_path):
    with pytest.raises(UserError, match="base is not a quantized run"):
        compare(runs[1], runs[1], "quick")
    with pytest.raises(UserError, match="nowhere"):
        compare(tmp_path / "nowhere", runs[1], "quick")
    edit(runs[1] / "eval.json", lambda record: record.clear())
    with pytest.raises(UserError, match="base has no quick evaluation in mode bf16"):
        compare(*runs, "quick")


def test_table(runs):
    lines = table(compare(*runs, "quick")).splitlines()
    assert lines[0] == "run against base on benchmark quick"
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == [
        "ARC-Easy",
        "W8A8",
        "-",
        "60.00",
        "52.00",
        "-8.00 [-15.41, -2.26]",
        "13.33 [+3.95, +24.75]",
        "-9/+1 of 100",
        "0.021",
        "8.8",
        "over 1 %",
    ]
    assert [cell.strip() for cell in lines[5].split("|")[5:-1]] == [
        "60.00",
        "+0.00 [-3.70, +3.70]",
        "0.00 [-6.40, +6.02]",
        "-0/+0 of 100",
        "1.00",
        "7.7",
        "pass, unresolved",
    ]
    assert len({len(line) for line in lines[2:6]}) == 1
    assert [cell.strip() for cell in lines[9].split("|")[1:-1]] == [
        "wikipedia",
        "W8A8",
        "-",
        "3.2000",
        "3.3000",
        "+0.1000 [-0.1484, +0.3484]",
        "0.0021",
        "3",
    ]
    decided = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[14:18]]
    assert decided[0] == [
        "W8A8",
        "Loss, wikipedia, nats",
        "+0.1000 [-0.1484, +0.3484]",
        "0.0160",
        "0.3097",
        "powerless",
    ]
    assert decided[1] == ["W8A8", "Accuracy, points", "-8.0 [-15.4, -2.3]", "0.6", "8.8", "harm"]
    assert lines[-2] == (
        "Loss APE 35.000 % (over the 0.5 % threshold), 50.000 % over the last tenth; final loss 3.0000, BF16 2.0000."
    )


def test_tasks_are_pooled_question_by_question(tmp_path):
    answers = {"arc_easy": RIGHT, "mmlu": [True] * 300}
    base = write_run(tmp_path / "base", config(), [2.0], {"bf16": answers}, TEXT)
    ours = {"bf16": answers, "w8a8": {"arc_easy": flipped(9, 1), "mmlu": [False] * 3 + [True] * 297}}
    run = write_run(tmp_path / "run", config(**HIF8), [2.0], ours, dict.fromkeys(ours, TEXT["bf16"]))
    result = compare(run, base, "quick")
    w8a8, bf16 = result["pooled"]
    assert (w8a8["mode"], w8a8["lost"], w8a8["gained"], w8a8["n"], bf16["lost"]) == ("w8a8", 12, 1, 400, 0)
    assert (w8a8["baseline"], w8a8["score"], w8a8["points"]) == pytest.approx((90, 87.25, -2.75))
    assert w8a8["p_value"] == pytest.approx(binomtest(1, 13).pvalue)
    assert [line.split("|")[1].strip() for line in table(result).splitlines()[4:10]][-2:] == ["All questions"] * 2


def test_a_remark_agrees_with_the_interval_beside_it(tmp_path):
    """Check a drop of 31 % [1.2, 58] of 16 questions, though the points alone reach a hundredth of the baseline's."""
    right = [True] * 13 + [False] * 3
    base = write_run(tmp_path / "base", config(), [2.0], {"bf16": {"arc_easy": right}})
    answers = {"bf16": {"arc_easy": right}, "w8a8": {"arc_easy": [True] * 9 + [False] * 7}}
    row = compare(write_run(tmp_path / "run", config(**HIF8), [2.0], answers), base, "quick")["tasks"][0]
    assert row["relative_drop_ci"][0] > 1 and row["ci"][1] > -0.01 * row["baseline"]
    assert remark(row) == "over 1 %"


def test_verdict_neither_hides_nor_overclaims(runs):
    result = compare(*runs, "quick")
    assert verdict({"": result}).startswith(
        "1 of 2 exact McNemar tests (5 %, Holm's correction over all) find a difference from BF16: ARC-Easy in W8A8 "
        "(-8.00 points, p = 0.021); elsewhere"
    )
    quiet = dict(result, tasks=[dict(row, p_value=0.4) for row in result["tasks"]])
    assert verdict({"exp8": quiet}) == (
        "Accuracy decides nothing: none of 2 exact McNemar tests (5 %, Holm's correction over all) finds a difference "
        "from BF16; the smallest p "
        "is 0.40 (exp8: ARC-Easy in W8A8). That is no evidence of equality: to be found, at least 7 answers must "
        "change, all one way, and with these questions a drop of up to 15.4 points (exp8: ARC-Easy in W8A8) cannot be "
        "excluded."
    )
    smallest = [holm([binomtest(0, flips).pvalue, 1.0])[0] for flips in (6, 7)]
    assert smallest[1] <= 0.05 < smallest[0]  # by the test itself
    assert verdict({"": dict(result, tasks=[])}) == "No benchmark task was compared."


def test_heldout_verdict_counts_what_excludes_zero(runs):
    result = compare(*runs, "quick")
    clear = dict(result, heldout=[dict(row, difference=-0.2, ci=[-0.3, -0.1]) for row in result["heldout"]])
    assert heldout_verdict([result, clear]) == (
        "Held-out loss in W8A8 differs from BF16 by -0.2000 to +0.1000 nats a token; "
        "1 of 2 intervals (95 %, uncorrected) exclude zero."
    )
    assert heldout_verdict([dict(result, heldout=[])]) == ""
    other = [dict(row, text="speeches", difference=0.5, ci=[0.4, 0.6]) for row in result["heldout"]]
    assert heldout_verdict([dict(result, heldout=other + result["heldout"])]) == (
        "Held-out loss in W8A8 differs from BF16 by +0.5000 nats a token on speeches; 1 of 1 intervals (95 %, "
        "uncorrected) exclude zero. Held-out loss in W8A8 differs from BF16 by +0.1000 nats a token on wikipedia; 0 of "
        "1 intervals (95 %, uncorrected) exclude zero."
    )
