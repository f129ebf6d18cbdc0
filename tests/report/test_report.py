"""The report: complete, self-contained, the same in both formats, and never stopped by what is missing."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qat.analysis.decisions import decide
from qat.config import BenchmarkConfig, ReportConfig
from qat.report import verdicts
from qat.report.experiment import Curve, Experiment, Telemetry, published
from qat.report.page import write_report
from qat.runs.folder import Run
from qat.studies import audit
from tests.helpers.page import Page
from tests.helpers.synthetic_runs import (
    HIF8,
    ROLES,
    compared_pair,
    config,
    edit,
    losses,
    suite,
    write_run,
    write_telemetry,
    write_validation,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[Page, str, Path]:
    """The whole suite."""
    root = tmp_path_factory.mktemp("suite")
    experiments = suite(root)
    html, markdown = write_report(experiments, root / "out")
    return Page(html), markdown.read_text(), html.parent


def test_page_stands_alone(report):
    page, _, folder = report
    assert page.open == []
    assert all(link.startswith("#") for link in page.links) and page.tags["script"] == page.tags["link"] == 0
    assert not re.search(r"@import|url\((?!%23)", page.source)
    assert all(src.startswith("data:image/svg+xml,%3C") for sources in page.images.values() for src in sources)
    assert len(page.ids) == len(set(page.ids)) and {link[1:] for link in page.links} == set(page.ids)
    assert len(page.source) < 3_000_000
    assert all((folder / name).stat().st_size > 10_000 for name in ("loss.png", "overshoot.png", "deltas.png"))


def test_the_first_screen_is_a_verdict(report):
    """Right below what the words mean: a row for every recipe and mode, a decision in every cell."""
    page, markdown, folder = report
    assert page.tables[0][0][:2] == ["Recipe", "Scored as"] and "Accuracy, points" in page.tables[0][0]
    rows = page.tables[0][1:]
    recipes = ["exp2 current", "exp2 most_recent", "exp3", "exp4/exp6", "exp5", "exp8"]
    assert [row[0] for row in rows if row[0]] == recipes
    assert [row[1] for row in rows if row[0]] == ["W8A8"] * len(recipes)
    recorded = json.loads((folder / "report.json").read_text())["verdicts"]
    words = set()
    for row, known in zip(rows, recorded, strict=True):
        for cell, answer in zip(row[2:], known["answers"].values(), strict=True):
            digits = 1 if answer["unit"] == "points" else 4
            low, high = answer["ci"]
            assert cell.split()[0].startswith(answer["answer"]) and f"[{low:+.{digits}f}, {high:+.{digits}f}]" in cell
            harm = -1 if answer["unit"] == "points" else 1  # of accuracy, less is worse
            ends = sorted([harm * low, harm * high])
            alone = decide(harm * answer["difference"], ends, answer["margin"], answer["detectable"])
            # Holm's correction over the recipes may take a decision back.
            assert answer["answer"] in ((alone, "undecided") if alone in ("harm", "gain") else (alone,))
            words.add(answer["answer"])
    assert len(words - {"powerless"}) > 1
    assert markdown.index("| Recipe") < markdown.index("\n## ") < markdown.index("## Provenance")


def test_harm_holds_after_holms_correction_over_the_recipes(monkeypatch):
    """Correct over the recipes of one way of scoring and one measure at a time."""
    p_values = {  # of three recipes
        ("w8a8", "speeches"): (0.01, 0.02, 0.03),
        ("w8a8", "articles"): (0.01, 0.03, 0.03),
        ("ptq", "speeches"): (0.02, 0.02, 0.02),
    }
    harm = dict.fromkeys(verdicts._NUMBERS) | {"decision": "harm"}

    def recipe(number):
        rows = [harm | {"mode": mode, "text": text, "p_value": p[number]} for (mode, text), p in p_values.items()]
        return SimpleNamespace(comparison={"seeds": 1, "heldout": rows, "measures": []})

    monkeypatch.setattr(verdicts, "distinct", lambda _: {f"exp{number}": recipe(number) for number in range(3)})
    decided = {key: [] for key in p_values}
    for row in verdicts.verdicts([]):
        for text, answer in row["answers"].items():
            decided[row["mode"], text].append(answer["answer"])
    assert list(decided.values()) == [["harm"] * 3, ["harm", "undecided", "undecided"], ["undecided"] * 3]


def test_a_task_with_one_answer_to_all_questions_is_powerless(tmp_path):
    run, base = (Run(path) for path in compared_pair(tmp_path, {"mmlu": [True] * 40, "arc_easy": [True, False] * 20}))
    html, _ = write_report([Experiment("exp8", [run], [base])], tmp_path / "out")
    page = Page(html)
    for row in page.table("Task", "Mode"):
        assert (row[5] == row[6] == "powerless") == (row[0] == "MMLU")
    for row in page.table("", "Source")[1:]:
        assert row[3].startswith("powerless") and not row[4].startswith("powerless")


def test_both_formats_hold_everything(report):
    """Among it: the run that exp4 and exp6 share is counted once, and exp7 has no comparison."""
    page, markdown, _ = report
    lines = [line.strip("# ") for line in markdown.splitlines() if line.startswith("#")]
    assert [heading for heading in page.headings if heading != "Differences in pictures"] == lines
    assert [line.partition(": ")[0] for line in lines if re.match("exp.: ", line)] == [f"exp{k}" for k in range(1, 9)]
    shared = [
        "0.5 % threshold in 6 of 6 compared runs",
        "none of 60 exact McNemar tests",  # PTQ of three baselines, each counted once
        "Not compared: exp7.",
        "42.51 → 41.25",
        "exp8-max against exp8-bf16",
        "One seed a cell",
        "MMLU in BF16, ",
        "cannot be told from chance, 25 % (binomial test, 5 %)",
        "pretrained checkpoint",
        "ours, pretrained",
        "ours, W8A8 by PTQ",
        "W8A8 costs +0.00",
        "torch 2.13.0, numpy 2.0",
        "0123456789ab, modified",
        "Loss APE 0.",
        "Held-out loss in W8A8 differs from BF16 by +0.00",
        "of 6 intervals (95 %, uncorrected) exclude zero",
        "comes to the same run as exp4",
        "first 2 steps in BF16",
        "paper, exp8 BF16",
        "KL, nats",
        "data.label_shift",
        "Settings that differ between runs",
    ]
    for words in shared:
        assert words in page.text, words
        assert words in " ".join(markdown.split()), words
    assert {"Loss on held-out text", "All questions of all tasks", "exp8: Held-out loss"} <= set(page.images)
    assert "an <odd> one, 2 cores" in page.text and r"an \<odd> one, 2 cores" in markdown
    for name in ("loss.png", "overshoot.png", "deltas.png"):
        assert f"]({name})" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ARC-Easy")]
    cells = {" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for line in rows for cell in line.split("|")}
    assert len(cells) > 30 and all(cell in page.text for cell in cells)


def test_settings_that_differ_are_a_row_a_run(report):
    page, _, _ = report
    columns = next(rows[0] for rows in page.tables if rows[0][0] == "Run" and "scaling.window" in rows[0])
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in page.table(*columns)}
    assert list(rows)[:7] == ["exp2 current", "exp2 most_recent", "exp3", "exp4/exp6", "exp5", "exp7", "exp8"]
    assert len(rows) == 11 and rows["exp5"]["scaling.window"] == "1" and rows["exp8"]["scaling.window"] == "64"


def test_what_is_missing_names_its_command(report):
    page, markdown, _ = report
    says = r"exp7-max has no quick evaluation in mode w8a8; make it: python scripts/eval.py run=\S*/exp7-max"
    assert re.search(says, page.text)
    assert re.search(says, markdown)


def test_what_a_run_warned_of_is_a_caveat(tmp_path):
    base = write_run(tmp_path / "base", config(), losses(1, 4, 1e-5))
    lost = [{"kind": "lost updates", "step": step, "warning": f"{share} % lost"} for step, share in ((1, 30), (9, 90))]
    lag = {"kind": "lagging scales", "step": 5, "layer": "layers.3", "warning": "scales lag"}
    rows = [
        lost[0],
        *({**lag, "role": role, "warning": f"{role} scales lag"} for role in ("weight", "gradient")),
        lost[1],
    ]
    (base / "warnings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [json.loads(line) | {"skipped": False} for line in (base / "metrics.jsonl").read_text().splitlines()]
    metrics[-1] |= {"skipped": True, "loss": None}
    (base / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    html, markdown = write_report([Experiment("exp1", [Run(base)], [])], tmp_path / "out")
    for line in (
        "base, step 9: 90 % lost.",
        "base, step 5: weight scales lag.",
        "base, step 5: gradient scales lag.",
        f"base skipped steps without a finite gradient: {metrics[-1]['step']}.",
    ):
        assert line in Page(html).text and line in markdown.read_text()
    assert "30 % lost" not in markdown.read_text()


def test_without_ptq_or_the_pretrained_checkpoint_the_rest_is_shown(tmp_path):
    run, base = (Run(path) for path in compared_pair(tmp_path))
    experiment = Experiment("exp8", [run], [base])
    html, markdown = write_report([experiment], tmp_path / "out")
    for text in (Page(html).text, markdown.read_text()):
        assert "ours, W8A8" in text and "ours, W8A8 by PTQ" not in text and "costs" not in text
        assert (
            "PTQ) was not scored beside exp8, so whether QAT was needed is unknown; scripts/eval.py scores it" in text
        )


def test_the_benchmark_that_is_asked_for_is_shown_and_no_other(tmp_path):
    run, base = (Run(path) for path in compared_pair(tmp_path))
    other = Experiment("exp8", [run], [base], BenchmarkConfig(name="paper"))
    assert other.pairs[0].comparison is None and "has no paper evaluation" in other.pairs[0].missing
    html, _ = write_report([other], tmp_path / "out")
    assert re.search(r"Benchmark:?\s+paper", Page(html).text)
    assert Experiment("exp8", [run], [base]).pairs[0].comparison["benchmark"] == "quick"


def test_nothing_at_all(tmp_path):
    html, markdown = write_report([], tmp_path)
    assert "No quantized run has been compared" in Page(html).text
    assert "No quantized run has been compared" in markdown.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "report.md"}


def test_every_stage_of_incompleteness(tmp_path):
    base = write_run(tmp_path / "base", config(), losses(1, 4, 1e-5))
    begun = write_run(tmp_path / "begun", config(**HIF8), [], state="running")
    lone = write_run(tmp_path / "lone", config(**HIF8), [3.0, math.nan, math.inf])
    other = write_run(tmp_path / "other", config(**HIF8, **{"optim.lr": 1e-4}), losses(1, 4, 1e-5) + 0.01)
    write_telemetry(other, blocks=[3], every=4)
    experiments = [
        Experiment("exp1", [], [], command="make exp1 BUDGET=gpu"),
        Experiment("exp3", [Run(tmp_path / "nowhere")], [Run(base)], command="make exp3"),
        Experiment("exp4", [Run(begun)], [Run(base)]),
        Experiment("exp5", [Run(lone)], []),
        Experiment("exp8", [Run(other)], [Run(base)]),
        Experiment("my sweep", [Run(lone)], [Run(base)]),
    ]
    html, markdown = write_report(experiments, tmp_path / "out")
    page = Page(html)
    for line in (
        "exp1 has not been run yet; make it: make exp1 BUDGET=gpu",
        "nowhere has not been run yet; make it: make exp3",
        "begun is running at step 0 of 36; finish it: python scripts/train.py experiment=exp8",
        "lone has no BF16 baseline yet; make it: python scripts/train.py experiment=exp8",
        "base is no matched baseline of other: optim.lr=1e-05 there, optim.lr=0.0001 here",
    ):
        assert line in page.text, line
        assert line in markdown.read_text(), line


def test_siblings_are_told_apart_by_what_differs(tmp_path):
    def labels(*changes):
        runs = [Run(write_run(tmp_path / f"{i}", config(**HIF8 | change))) for i, change in enumerate(changes)]
        return [pair.label for pair in Experiment("exp2", runs, []).pairs]

    assert labels({"scaling.algo": "current"}, {"scaling.window": 30}) == ["exp2 current", "exp2 max"]
    assert labels({"scaling.window": 16}, {"scaling.window": 30}) == ["exp2 window 16", "exp2 window 30"]
    assert labels({"quant.ste": "masked"}, {}) == ["exp2 ste masked", "exp2 ste pass_through"]
    assert labels({}, {}) == ["exp2 0", "exp2 1"]  # the ids
    assert labels({}) == ["exp2"]
    assert labels({"optim.lr": 2.5e-4, "seed": 1}, {"optim.lr": 2.5e-4}, {"optim.lr": 1e-3}) == [
        "exp2 lr 2.5e-4 seed 1",
        "exp2 lr 2.5e-4 seed 0",
        "exp2 lr 1e-3 seed 0",
    ]


def test_overshoot_is_the_largest_of_a_block(tmp_path):
    run = write_run(tmp_path / "run", config(**HIF8), [3.0] * 4)
    write_telemetry(run, blocks=[3, 12], every=2)
    edit(run / "telemetry.jsonl", lambda r: r["step"] == 2 and ".3." in r.get("layer", "") and r.update(overshoot=None))
    telemetry = Telemetry(Run(run).telemetry())
    assert set(telemetry.tensors) == set(ROLES) and [step for step, _ in telemetry.updates] == [2, 4]
    steps, blocks, grid = telemetry.overshoot("gradient")
    assert (list(steps), blocks, grid.shape) == ([2, 4], ["3", "12"], (2, 2))
    assert np.isnan(grid[0, 0])
    seen = [r["overshoot"] for r in telemetry.tensors["gradient"] if r["step"] == 4 and ".12." in r["layer"]]
    assert len(seen) == 3 and grid[1, 1] == max(seen)
    assert telemetry.means("weight")["tier3"] == pytest.approx(0.93)


def test_losses_on_held_out_texts_are_drawn_as_changes(tmp_path, report):
    run = write_run(tmp_path / "run", config(**HIF8), [3.0] * 4)
    write_telemetry(run, every=2)
    write_validation(run, every=2, noise=0.0, embedded=-0.2, wikipedia=0.1)
    edit(run / "telemetry.jsonl", lambda r: r["step"] == 4 and r.get("text") == "embedded" and r.update(loss=None))
    telemetry = Telemetry(Run(run).telemetry())
    assert list(telemetry.texts) == ["embedded", "wikipedia"] and len(telemetry.updates) == 2
    steps, change = telemetry.drift("wikipedia")
    assert list(steps) == [0, 2, 4] and change == pytest.approx([0, 0.05, 0.1])
    assert telemetry.drift("embedded")[1] == pytest.approx([0, -0.1, np.nan], nan_ok=True)
    assert [alt for alt in report[0].images if alt.endswith(": Held-out loss")] == ["exp8: Held-out loss"]


def test_curves_are_compared_where_both_have_steps(tmp_path):
    run = Curve.of(Run(write_run(tmp_path / "run", config(**HIF8 | {"warmup.bf16": 0.5}), [2.0, 2.2, 2.0, 2.0])))
    base = Curve.of(Run(write_run(tmp_path / "base", config(), [2.0, 2.0])))
    steps, percent = run.relative_to(base)
    assert run.start == 3 and base.start is None
    assert list(steps) == [1, 2] and percent == pytest.approx([0, 10])


def test_published_numbers_agree_with_each_other():
    paper = published()
    assert list(paper["experiments"]) == ReportConfig().experiments
    assert len(paper["disagreements"]) == 16 and max(switch.row or 0 for switch in audit.SWITCHES) == 15
    drops = 0
    for entry in paper["experiments"].values():
        assert {"title", "question", "recipe", "lr", "notes"} <= set(entry)
        for score in entry.get("scores", {}).values():
            if {"drop", "quantized"} <= set(score):
                drops += 1
                assert 100 * (1 - score["quantized"] / score["bf16"]) == pytest.approx(score["drop"], abs=0.02)
    assert drops == 19
    assert json.dumps(paper)
