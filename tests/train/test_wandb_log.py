"""The mirror in Weights & Biases: written offline, read back with its own reader, and never needed."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import wandb

from qat.analysis.compare import loss_ape
from qat.config import LoggerConfig
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.train import loop, wandb_log
from qat.utils.signals import Preempted
from tests.conftest import wandb_records
from tests.helpers.steps import stopped


@pytest.fixture(scope="module")
def mirrored(configure, tmp_path_factory):
    """(a finished run that was stopped before step 6 and resumed after step 4, its configuration, the W&B records of
    the folder after the stop and after the end)"""
    words = ("experiment=exp8", "logger=wandb", "budget.steps=8", "budget.accumulation=1")
    cfg = configure(tmp_path_factory.mktemp("mirrored"), *words)
    loop.train(dataclasses.replace(baseline_of(cfg), logger=LoggerConfig(name="local")))
    before = wandb_records(stopped(cfg, 6).path)
    run = loop.train(cfg)
    return run, cfg, [*before, *wandb_records(run.path)]


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


def history(records: list[dict]) -> list[dict]:
    """The rows of a session, without the times that W&B adds."""
    rows = [record["item"] for record in of_kind(records, "history")]
    return [{key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")} for row in rows]


def test_both_sessions_are_one_run_and_say_what_it_is(mirrored):
    run, _, sessions = mirrored
    assert len(sessions) == 2
    for records in sessions:
        about = of_kind(records, "run")[0]
        assert about["run_id"] == run.id.rpartition("-")[2] and about["display_name"] == run.id
        assert (about["project"], about["run_group"], about["job_type"]) == ("hif8-qat", "exp8", "quantized")
        assert sorted(about["tags"]) == sorted(["paper", "smoke", "tiny", "hif8", "max", "seed0"])
        recorded = {key: value for key, value in about["config"]["update"].items() if key != "_wandb"}
        assert recorded == run.config()


def test_every_session_holds_every_step_once(mirrored):
    run, _, sessions = mirrored
    assert [[row["_step"] for row in history(each)] for each in sessions] == [[0, 1, 2, 3, 4, 5], [*range(9)]]
    before, *steps = history(sessions[-1])
    assert before.keys() == {"_step", "validation/embedded", "validation/wikipedia"}
    for metrics, row in zip(run.metrics(), steps, strict=True):
        numbers = {key: value for key, value in metrics.items() if type(value) in (int, float)}
        kept = {f"train/{key}": value for key, value in numbers.items() if key != "step"}
        assert {key: value for key, value in row.items() if key.startswith("train/")} == kept
        assert ("train/overshoot_max" in row) == (metrics["step"] > 1)


def test_every_step_is_compared_with_the_baseline(mirrored):
    run, cfg, sessions = mirrored
    losses = [[row["loss"] for row in each.metrics()] for each in (run, Run.of(baseline_of(cfg)))]
    rows = history(sessions[-1])[1:]
    assert [row["compare/loss_difference"] for row in rows] == [q - b for q, b in zip(*losses, strict=True)]
    errors = [row["compare/loss_error_percent"] for row in rows]
    assert sum(errors) / len(errors) == pytest.approx(loss_ape(*losses)) and errors[-1] > 0


def test_telemetry_is_a_few_numbers_a_role_at_the_steps_that_have_it(mirrored):
    run, _, sessions = mirrored
    rows = {row["_step"]: row for row in history(sessions[-1])}
    assert [step for step in rows if any(key.startswith("telemetry/") for key in rows[step])] == [2, 6, 8]
    assert sum(key.startswith("telemetry/") for key in rows[8]) == 3 * 9 + 3
    for step in (2, 6, 8):
        probed = [row for row in run.telemetry() if row["step"] == step]
        of_role = [row for row in probed if row.get("role") == "gradient"]
        shown = {key.rpartition("/")[2]: value for key, value in rows[step].items() if "y/gradient/" in key}
        assert shown["overshoot_max"] == max(row["overshoot"] for row in of_role)
        assert shown["overshoot_share"] == sum(row["overshoot"] > 1.000001 for row in of_role) / len(of_role)
        assert shown["sqnr_db_min"] == min(row["sqnr_db"] for row in of_role)
        assert shown["tier2"] == pytest.approx(sum(row["tier2"] for row in of_role) / len(of_role))
        (updated,) = (row["updated"] for row in probed if "updated" in row)
        assert rows[step]["telemetry/lost_updates/bf16"] == 1 - updated["bf16"]


def test_losses_on_held_out_texts_are_curves_that_begin_before_training(mirrored):
    run, _, sessions = mirrored
    rows = history(sessions[-1])
    shown = {(row["_step"], key): value for row in rows for key, value in row.items() if "validation/" in key}
    probed = [row for row in run.telemetry() if "text" in row]
    assert shown == {(row["step"], f"validation/{row['text']}"): row["loss"] for row in probed}
    assert sorted({step for step, _ in shown}) == [0, 4, 8]


def test_a_stopped_session_is_marked_as_failed(mirrored):
    assert [of_kind(records, "exit")[0].get("exit_code", 0) for records in mirrored[2]] == [1, 0]


def test_a_folder_is_sent_again_from_its_files_alone(mirrored, main):
    run, _, sessions = mirrored
    shutil.rmtree(run.path / "wandb")
    for _ in range(2):
        code, said, _ = main("dashboard.py", f"run={run.path}")
        assert code == 0 and said.strip().endswith(f"wandb sync {run.path}/wandb/offline-run-*")
    (again,) = wandb_records(run.path)
    assert history(again) == history(sessions[-1])
    about, before = (of_kind(records, "run")[0] for records in (again, sessions[-1]))
    assert all(about[key] == before[key] for key in ("run_id", "display_name", "project", "run_group", "tags"))
    assert of_kind(again, "exit")[0].get("exit_code", 0) == 0


def test_results_are_the_comparison_as_flat_numbers(config):
    cfg = config("experiment=exp8")
    run = Run.of(cfg)
    run.create(cfg)
    tried = {"step": 2, "shadow": "max:4", "unquantized": 3.0}
    with run.append("telemetry.jsonl") as append:
        append([{**tried, "loss": loss} for loss in (3.25, 3.75, None)])
    row = {"mode": "w8a8", "task": "mmlu", "score": 24.0, "points": -1.0, "relative_drop": 4.0, "p_value": 0.5}
    own = {"text": "embedded", "mode": "w8a8", "loss": 3.0, "difference": 0.01, "kl": 0.02, "decision": "equivalent"}
    wikipedia = own | {"text": "wikipedia", "loss": 2.0}
    other = row | {"task": "arc_easy", "relative_drop": None}  # the baseline had none right
    bits = {"mode": "w8a8", "task": "pooled", "measure": "bits_per_byte", "difference": 0.1, "decision": "harm"}
    comparison = {"loss": {"ape": 0.2}, "tasks": [row, other], "pooled": [], "heldout": [own, wikipedia]}
    comparison["measures"] = [bits, bits | {"task": "mmlu"}]
    mmlu = {f"w8a8/mmlu/{key}": row[key] for key in ("score", "points", "relative_drop", "p_value")}
    easy = {f"w8a8/arc_easy/{key}": row[key] for key in ("score", "points", "p_value")}
    heldout = {f"w8a8/heldout/{key}": own[key] for key in ("loss", "difference", "kl", "decision")}
    heldout |= {f"w8a8/heldout/wikipedia/{key}": wikipedia[key] for key in ("loss", "difference", "kl", "decision")}
    heldout |= {f"w8a8/pooled/bits_per_byte/{key}": bits[key] for key in ("difference", "decision")}
    alone = {"warnings": 0, "loss_ape_percent": 0.2, "shadow/max:4/damage": 0.5}
    assert wandb_log.results(run, cfg, comparison) == alone | mmlu | easy | heldout


@pytest.mark.parametrize("changes", [{"logger.name": "local"}, {"logger.name": "wandb", "logger.mode": "disabled"}])
def test_without_a_logger_wandb_is_not_even_imported(config, changes, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = config(**changes)
    run = Run.of(cfg)
    run.create(cfg)
    with wandb_log.mirror(run, cfg) as log:
        log({"step": 1, "loss": 1.0}, [])
    assert not (run.path / "wandb").exists()


@pytest.fixture
def asked(monkeypatch):
    """Return what wandb.init was asked for. Online it fails, as without a key, and holds on to the run until a
    teardown; `asked.faults[name]` is raised by that call of W&B's."""
    busy = []

    class Calls(list):
        faults: dict[str, BaseException] = {}  # noqa: RUF012

        def call(self, name: str) -> None:
            if name in self.faults:
                raise self.faults[name]

    calls = Calls()

    class Session:
        def __init__(self):
            self.summary = SimpleNamespace(update=lambda found: calls.call("summary"))

        def log(self, points, step):
            calls.call("log")
            calls[-1]["logged"] = step

        def finish(self, exit_code):
            calls.call("finish")
            calls[-1]["finished"] = True

    def init(**given):
        calls.append(given)
        wandb.Settings(run_tags=given["tags"], project=given["project"])  # as the real one checks them
        if given["mode"] == "online":
            busy.append(True)
            raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")
        if busy:
            raise RuntimeError("run ID is in use")
        calls.call("init")
        return Session()

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("wandb.teardown", busy.clear)
    monkeypatch.setattr(calls, "faults", {}, raising=False)
    return calls


def test_a_baseline_and_a_run_outside_the_experiments_are_named_as_such(config, asked):
    cfg = config(**{"logger.name": "wandb", "quant.format": "none", "seed": 3, "protocol": "released"})
    with wandb_log.mirror(Run.of(cfg), cfg):
        pass
    (given,) = asked
    assert (given["group"], given["job_type"]) == ("sweep", "baseline")
    assert given["tags"] == ["released", "smoke", "tiny", "bf16", "seed3"] and given["mode"] == "offline"
    assert given["dir"] == str(Run.of(cfg).path.resolve()) and given["finished"]


def test_a_server_out_of_reach_does_not_stop_a_run(config, asked, capsys):
    cfg = config(**{"logger.name": "wandb", "logger.mode": "online"})
    with wandb_log.mirror(Run.of(cfg), cfg):
        pass
    assert [given["mode"] for given in asked] == ["online", "offline"] and asked[1]["finished"]
    warning = capsys.readouterr().out
    assert warning.startswith("warning: ") and "No API key configured." in warning and warning.count("\n") == 1


def test_names_longer_than_tags_of_wandb_are_cut(config, asked, capsys):
    cfg = config(**{"logger.name": "wandb", "model.name": "m" * 80, "budget.name": "b" * 80})
    with wandb_log.mirror(Run.of(cfg), cfg):
        pass
    assert {"m" * 64, "b" * 64} <= set(asked[0]["tags"]) and asked[0]["finished"]
    assert capsys.readouterr().out == ""


LOST = ConnectionResetError("Connection lost")
FAULTS = {
    "settings": {"init": ValueError("1 validation error\nfor Settings")},
    "disk": {"init": OSError(errno.ENOSPC, "No space left on device")},
    "log": {"log": LOST},
    "summary": {"summary": TypeError("not a number")},
    "finish": {"finish": TimeoutError("still uploading")},
    "all": dict.fromkeys(("log", "summary", "finish"), LOST),  # its process was killed
    "import": {},
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("required", [False, True], ids=["mirror", "dashboard"])
def test_what_fails_in_wandb_is_said_once_and_ends_no_run(config, asked, monkeypatch, capsys, name, required):
    monkeypatch.setattr(asked, "faults", FAULTS[name])
    if name == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = config(**{"logger.name": "wandb"})
    run = Run.of(cfg)
    steps = []

    def work():
        with wandb_log.mirror(run, cfg, required=required) as log:
            for step in (1, 2):
                log({"step": step, "loss": 1.0}, [])
                steps.append(step)

    if required:
        with pytest.raises(UserError, match=rf"^{re.escape(str(run.path))}: W&B cannot mirror it \([^\n]+$"):
            work()
        return
    work()
    assert steps == [1, 2]
    warning = capsys.readouterr().out.strip()
    assert warning.startswith("warning: W&B fails (") and "\n" not in warning
    assert warning.endswith(f"`python scripts/dashboard.py run={run.path}`")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Preempted("SIGTERM")], ids=["interrupt", "preempted"])
@pytest.mark.parametrize("call", ["init", "log", "summary", "finish"])
def test_a_stop_while_wandb_works_is_a_stop(config, asked, monkeypatch, call, stop):
    monkeypatch.setattr(asked, "faults", {call: stop})
    cfg = config(**{"logger.name": "wandb"})
    with pytest.raises(type(stop)), wandb_log.mirror(Run.of(cfg), cfg) as log:
        log({"step": 1, "loss": 1.0}, [])


def test_a_folder_of_wandb_that_stays_stops_nothing(config, asked, monkeypatch, capsys):
    cfg = config(**{"logger.name": "wandb"})
    (Run.of(cfg).path / "wandb" / "offline-run-1").mkdir(parents=True)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    with wandb_log.mirror(Run.of(cfg), cfg):
        pass
    assert asked[0]["finished"] and "cannot be removed yet (Permission denied)" in capsys.readouterr().out
