"""PTQ of the baseline beside a quantized run: what QAT recovers, and whether by its weights or by its scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qat.analysis.stats import student
from qat.errors import UserError
from qat.report.text import qat_verdict, table, verdict
from tests.helpers.synthetic_runs import PTQ, RIGHT, TEXT, compare, config, edit, flipped, lossy_pair, write_run


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    return lossy_pair(tmp_path)


def with_ptq(runs, losses: list[float], lost: int = 20, calibrated: list[float] | None = None) -> dict:
    """The comparison, with a PTQ of the baseline that has these held-out losses and lost so many answers; `calibrated`
    are the losses of the run's own weights under PTQ's scales."""
    if calibrated:
        text = {"loss": float(np.mean(calibrated)), "document_losses": calibrated, "text_hash": "h-wikipedia"}
        scales = {"sequences": 16, "heldout": {"wikipedia": text}}
        edit(runs[0] / "eval.json", lambda record: record["quick"]["w8a8"].update(qat_weights_ptq_scales=scales))
    answers = {"bf16": {"arc_easy": RIGHT}, PTQ: {"arc_easy": flipped(lost, 0)}}
    write_run(runs[1], config(), [2.5, 2.0], answers, TEXT | {PTQ: {"wikipedia": losses}})
    return compare(*runs, "quick")


def test_ptq_of_the_baseline_stands_beside_the_run(runs):
    result = with_ptq(runs, [3.2, 3.5, 3.6])
    assert result["ptq"] == PTQ and [row["mode"] for row in result["tasks"]] == ["w8a8", "ptq", "bf16"]
    ptq = result["tasks"][1]
    assert (ptq["lost"], ptq["gained"], ptq["baseline"], ptq["score"]) == (20, 0, 60, 40)
    held = {row["mode"]: row for row in result["heldout"]}
    assert held["ptq"]["difference"] == pytest.approx(0.7 / 3) and held["ptq"]["ci"][0] > 0
    (qat,) = result["qat"]
    mean = student(np.array([0.1, 0.1, 0.2]))  # paired with the run's own sequences: 3.1, 3.4, 3.4
    assert (qat["ptq"], qat["w8a8"], qat["recovered"]) == pytest.approx((0.7 / 3, 0.1, 0.4 / 3))
    assert qat["ci"] == pytest.approx(mean.interval())
    assert json.loads(json.dumps(result)) == result
    assert "| W8A8 by PTQ " in table(result) and verdict({"": result}).startswith("2 of 3 exact McNemar tests")
    assert verdict({"a": result, "b": dict(result, run="other")}).startswith("1 of 5 exact")  # they share one PTQ


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (
            [3.3, 3.61, 3.6],
            "+0.3033 nats a token of held-out text, with QAT and its scales +0.1000; QAT minus PTQ, -0.2033 [-0.2",
        ),
        (
            [3.2, 3.5, 3.4],
            "with QAT and its scales +0.1000; QAT minus PTQ, -0.0667 [-0.2101, +0.0768], is not beyond noise, so",
        ),
        (
            [3.0, 3.31, 3.3],
            "held-out text, with QAT and its scales +0.1000; QAT minus PTQ, +0.0967 [+0.0823, +0.1110], is worse bey",
        ),
    ],
)
def test_whether_qat_was_needed_is_said_in_words(runs, losses, says):
    result = with_ptq(runs, losses)
    assert says in qat_verdict([result]) and says in table(result)


def test_qat_of_several_runs_is_counted(runs):
    results = [with_ptq(runs, losses) for losses in ([3.3, 3.61, 3.6], [3.2, 3.5, 3.4], [3.0, 3.31, 3.3])]
    assert qat_verdict(results) == (
        "Without QAT (PTQ of the BF16 baseline, max calibration) W8A8 costs +0.0033 to +0.3033 nats a token. QAT, "
        "with its own scales, minus PTQ: -0.2033 to +0.0967; of 3 intervals (95 %, uncorrected) 1 lie below zero, 1 "
        "above."
    )
    assert qat_verdict([compare(*runs, "quick") | {"qat": []}]) == ""


def test_what_qat_does_is_told_apart_into_its_weights_and_its_scales(runs):
    """The run has 3.1, 3.4, 3.4 under its own scales."""
    result = with_ptq(runs, [3.2, 3.5, 3.6], calibrated=[3.1, 3.45, 3.5])
    (qat,) = result["qat"]
    weights, scales = [-0.1, -0.05, -0.1], [0, -0.05, -0.1]
    for part, changes in (("weights", weights), ("scales", scales)):
        mean = student(np.array(changes))
        assert qat[part]["difference"] == pytest.approx(mean.value)
        assert qat[part]["ci"] == pytest.approx(mean.interval())
    assert qat["weights"]["difference"] + qat["scales"]["difference"] == pytest.approx(-qat["recovered"])
    assert qat_verdict([result]).endswith(
        "Of QAT minus PTQ, its weights (under PTQ's scales) make -0.0833 [-0.1550, -0.0116], its scales "
        "-0.0500 [-0.1742, +0.0742]."
    )
    other = with_ptq(runs, [3.2, 3.5, 3.6], calibrated=[3.2, 3.5, 3.7])
    assert qat_verdict([result, other, result]).endswith(
        "its weights (under PTQ's scales) make -0.0833 to +0.0333 (2 of 3 intervals exclude zero), its scales -0.1667 "
        "to -0.0500 (0 of 3 intervals exclude zero)."
    )


def test_other_calibrations_are_not_told_apart(runs):
    with_ptq(runs, [3.2, 3.5, 3.6], calibrated=[3.1, 3.45, 3.5])
    edit(runs[1] / "eval.json", lambda record: record["quick"][PTQ].update(request={"calibration_sequences": 4}))
    with pytest.raises(UserError, match=rf"calibration sequences differs: 16 in run, 4 in base \({PTQ}\);"):
        compare(*runs, "quick")


def test_a_stale_ptq_is_refused_by_name(runs):
    with_ptq(runs, [3.2, 3.5, 3.6])
    edit(runs[1] / "eval.json", lambda record: record["quick"][PTQ].update(lm_eval="old"))
    with pytest.raises(UserError, match=rf"lm-eval version differs: old in base \({PTQ}\), 0.4.13 in base;"):
        compare(*runs, "quick")
