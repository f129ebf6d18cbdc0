"""What the report arranges for its figures, and what it reads from the studies beside it."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from qat.config import BenchmarkConfig
from qat.errors import UserError
from qat.report import studies, tables
from qat.report.experiment import SHARES, Experiment, Telemetry, published
from qat.report.page import _recipe, write_report
from qat.report.panels import Estimate, amax, overshoot
from qat.report.panels import forest as of_modes
from qat.report.plots import Mark, forest
from qat.runs.folder import Run
from qat.studies import factorial
from qat.studies.page import write_factorial
from tests.conftest import typed
from tests.helpers.page import Page
from tests.helpers.studies import WORDS, invent
from tests.helpers.synthetic_runs import compared_pair, edit


def test_amax_stands_beside_what_was_predicted():
    def row(step, amax, overshoot, layer="layers.1", role="weight"):
        return {"step": step, "layer": layer, "role": role, "amax": amax, "overshoot": overshoot}

    rows = [row(1, 3.0, 1.5), row(2, 1 / 3, 0.25), row(2, 1.0, 0.1, "layers.2"), row(3, math.inf, math.inf)]
    telemetry = Telemetry([*rows, row(3, 1.0, None, role="gradient"), {"step": 3, "updated": {}}])
    steps, amaxes, predicted = telemetry.amax_history("weight", "layers.1")
    assert list(steps) == [1, 2, 3] and amaxes == pytest.approx([3.0, 1 / 3, math.nan], nan_ok=True)
    assert predicted == pytest.approx([2.0, 4 / 3, math.nan], nan_ok=True)
    assert [list(part) for part in telemetry.amax_history("weight", "layers.2")] == [[2], [1.0], [10.0]]
    assert all(len(part) == 0 for part in telemetry.amax_history("gradient", "layers.1"))
    assert telemetry.worst_layer() == "layers.1" and Telemetry([]).worst_layer() is None


def test_the_amax_figure_marks_what_exceeds_the_prediction():
    rows = [
        {"step": step, "layer": "layers.1", "role": "weight", "amax": amax, "overshoot": amax / 2}
        for step, amax in ((1, 1.0), (2, 3.0), (4, 5.0))
    ]
    axes = Figure().add_subplot()
    panel = amax(Telemetry(rows), "weight", "layers.1", last_step=4)
    panel.draw(axes)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "predicted": [[1, 2], [2, 2], [4, 2]],
        "amax": [[1, 1], [2, 3], [4, 5]],
        "larger than predicted": [[2, 3], [4, 5]],
    }


def test_a_row_far_out_is_an_arrow_and_does_not_stretch_the_axis():
    values = {"max": (0.01, 0.006, 0.014), "cast": (-0.002, -0.006, 0.002), "int8": (0.39, 0.36, 0.42), "none": None}
    rows = [(name, [Mark(row[0], row[1:])] if row else []) for name, row in values.items()]
    axes = Figure().add_subplot()
    forest("", rows, "nats", margin=0.018, dotted=0.01).draw(axes)
    low, high = axes.get_xlim()
    assert -0.025 < low < -0.018 and 0.018 < high < 0.025
    drawn = {tuple(line.get_xydata()[0]): line.get_marker() for line in axes.lines if line.get_marker() != "None"}
    assert drawn == {(0.01, 3): "o", (-0.002, 2): "o", (high, 1): ">"}
    assert [text.get_text() for text in axes.texts] == ["+0.39"]


def test_the_control_is_not_drawn_and_does_not_stretch_the_axis():
    modes = {"w8a8": Estimate(0.016, (0.01, 0.02)), "control": Estimate(0.76, (0.7, 0.79))}
    axes = Figure().add_subplot()
    of_modes("", [("exp8", modes, None)], "nats").draw(axes)
    assert max(map(abs, axes.get_xlim())) < 0.03


def test_wide_intervals_beside_a_narrow_threshold_are_on_the_axis():
    modes = {mode: Estimate(0.7, (-1.8, 2.8), -0.3) for mode in ("w8a8", "bf16")}
    axes = Figure().add_subplot()
    of_modes("", [("exp8", modes, None)], "points").draw(axes)
    assert axes.get_xlim()[0] < -1.8 and axes.get_xlim()[1] > 2.8 and not axes.texts


@pytest.mark.parametrize("marks", [[], [Mark(0.0, (0.0, 0.0))], [Mark(1.0)]])
def test_a_forest_has_an_axis_whatever_its_rows(marks):
    axes = Figure().add_subplot()
    forest("", [("one", marks)], "nats").draw(axes)
    low, high = axes.get_xlim()
    assert low < 0 < high and all(low < mark.value < high for mark in marks)


def test_mantissa_bits_are_means_of_a_block():
    shares = dict.fromkeys(SHARES, 0.0)
    rows = [
        {"step": step, "layer": f"layers.{block}.mlp", "role": "weight", "overshoot": 1.0, **shares, "tier3": share}
        for block, step, share in ((10, 1, 0.5), (10, 2, 0.7), (9, 1, 1.0))
    ]
    blocks, means = Telemetry(rows).shares("weight")
    assert blocks == ["9", "10"] and list(means["tier3"]) == pytest.approx([1.0, 0.6]) and not means["tier0"].any()


def test_a_factorial_beside_the_report_is_part_of_it(tmp_path):
    keys = list(itertools.product(*factorial.FACTORS.values()))
    measured = invent(keys, damage=lambda key, _: 0.02 if key[0] == "max w64" else 0.01)
    write_factorial(measured, {}, typed(tmp_path, *WORDS, "experiment=exp8"), tmp_path / "factorial")
    html, markdown = write_report([], tmp_path)
    page, recorded = Page(html), json.loads((tmp_path / "factorial" / "factorial.json").read_text())
    assert studies.TITLES["factorial"] in page.headings and studies.TITLES["audit"] not in page.headings
    for words in (
        "Sufficient: the recipe meets every threshold (W8A8)",
        "Model: tiny",
        *recorded["claims"][0]["says"].split(","),
    ):
        assert words in page.text and words in markdown.read_text()
    means = {(cell["scaling"], cell["lr"], cell["warmup"]): cell for cell in recorded["interactions"][0]["cells"]}
    assert list(means) == keys and all(cell["low"] < cell["value"] < cell["high"] for cell in means.values())
    assert means["max w64", "1e-5", "0"]["value"] == pytest.approx(0.02, abs=0.002)
    assert recorded["interactions"][1]["cells"][0]["value"] == pytest.approx(0.2)  # percent, not its logarithm
    assert {f"factorial: {response['title']}" for response in recorded["interactions"]} <= set(page.images)
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text('{"claims": 3}')
    with pytest.raises(UserError, match=r"audit\.json is damaged \(.*\); write it again: make audit"):
        write_report([], tmp_path)


def test_a_column_of_the_heat_map_stands_at_its_step():
    """Logged are the first step, every so many, and the last."""
    rows = [{"step": step, "layer": "layers.1", "role": "weight", "overshoot": 1.0} for step in (2, 8, 14, 16)]
    axes = Figure().add_subplot()
    overshoot(Telemetry(rows), "weight", "", last_step=16, bar=False).draw(axes)
    (mesh,) = axes.collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [1.5, 5, 11, 15, 16.5]


def test_baselines_are_shown_by_the_benchmark_that_is_asked_for(tmp_path):
    """Their folders keep the configuration of the first command."""
    run, base = compared_pair(tmp_path)
    edit(base / "eval.json", lambda record: record.update(full={"bf16": {"tasks": {}, "heldout": {}}}))
    for name, shown in (("quick", "50.00"), ("full", "–"), ("other", "–")):
        experiment = Experiment("exp8", [Run(run)], [Run(base)], BenchmarkConfig(name=name))
        row = tables.baselines([experiment], published()).rows[0]
        assert str(row[0]) == base.name and shown in str(row[-1])


def test_recipes_with_other_tasks_stand_side_by_side(tmp_path):
    pairs = [compared_pair(tmp_path / name, {name: [True, False] * 20}) for name in ("mmlu", "arc_easy")]
    experiments = [Experiment(run.parent.name, [Run(run)], [Run(base)]) for run, base in pairs]
    rows = [row for row in tables.summary(experiments, published()).rows if str(row[1]) == "ours, W8A8"]
    assert [[str(cell) == "–" for cell in row[-2:]] for row in rows] == [[False, True], [True, False]]


def test_a_recipe_names_what_it_trains_by_unless_that_is_the_default(config):
    words = ("estimator=cage", "loss=distill", "optim.moments=bf16", "scaling=lsq")
    told, plain = (
        _recipe(SimpleNamespace(config=dataclasses.asdict(cfg)), cfg) for cfg in (config(*words), config("scaling=max"))
    )
    assert "lsq, learning rate 0.1 · CAGE 10 · distillation 1 · Adam moments in bf16 · quantized from" in told
    assert "max of the last 64 · quantized from" in plain
