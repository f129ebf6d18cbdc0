"""The mirror in Weights & Biases: written offline, read back with its own reader, and never needed."""

from __future__ import annotations

import sys

import pytest
import wandb

from qat import loop, tracking
from qat.runs import Run
from qat.step import Trainer
from tests.conftest import wandb_records


@pytest.fixture(scope="module")
def mirrored(configure, tmp_path_factory):
    """(a finished run that was stopped before step 6 and resumed after step 4, the W&B records of both sessions)"""
    words = ("experiment=exp8", "logger=wandb", "budget.steps=8", "budget.accumulation=1")
    cfg = configure(tmp_path_factory.mktemp("mirrored"), *words)
    real = Trainer.step

    def step(self, number, batches, **how):
        if number == 6:
            raise KeyboardInterrupt
        return real(self, number, batches, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", step)
        loop.train(cfg)
    run = loop.train(cfg)
    return run, wandb_records(run.path)


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


def test_both_sessions_are_one_run_and_say_what_it_is(mirrored):
    run, sessions = mirrored
    assert len(sessions) == 2
    for records in sessions:
        about = of_kind(records, "run")[0]
        assert about["run_id"] == run.id.rpartition("-")[2] and about["display_name"] == run.id
        assert (about["project"], about["run_group"], about["job_type"]) == ("hif8-qat", "exp8", "quantized")
        assert sorted(about["tags"]) == sorted(["paper", "smoke", "tiny", "hif8", "max", "seed0"])
        recorded = {key: value for key, value in about["config"]["update"].items() if key != "_wandb"}
        assert recorded == run.config()


def test_every_step_is_one_row(mirrored):
    run, sessions = mirrored
    rows = [[record["item"] for record in of_kind(records, "history")] for records in sessions]
    assert [[row["_step"] for row in each] for each in rows] == [[1, 2, 3, 4, 5], [5, 6, 7, 8]]
    final = {row["_step"]: row for each in rows for row in each}
    for metrics in run.metrics():
        kept = {f"train/{key}": value for key, value in metrics.items() if key != "step" and value is not None}
        assert {key: value for key, value in final[metrics["step"]].items() if key.startswith("train/")} == kept
    assert all("train/overshoot_max" in final[step] for step in range(2, 9)) and "train/overshoot_max" not in final[1]


def test_a_stopped_session_is_marked_as_failed(mirrored):
    codes = [of_kind(records, "exit")[0].get("exit_code", 0) for records in mirrored[1]]
    assert codes == [1, 0]


@pytest.mark.parametrize("changes", [{"logger.name": "local"}, {"logger.name": "wandb", "logger.mode": "disabled"}])
def test_without_a_logger_wandb_is_not_even_imported(config, changes, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = config(**changes)
    run = Run.of(cfg)
    run.create(cfg)
    with tracking.mirror(run, cfg) as log:
        log({"loss": 1.0}, 1)
        log.summary({"points": 2.0})
    assert not (run.path / "wandb").exists()


@pytest.fixture
def asked(monkeypatch):
    """What wandb.init was asked for; online it fails, as without a key."""
    calls = []

    class Session:
        def finish(self, **_):
            calls[-1]["finished"] = True

    def init(**given):
        calls.append(given)
        if given["mode"] == "online":
            raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")
        return Session()

    monkeypatch.setattr("wandb.init", init)
    return calls


def test_a_baseline_and_a_run_outside_the_experiments_are_named_as_such(config, asked):
    cfg = config(**{"logger.name": "wandb", "quant.format": "none", "seed": 3, "protocol": "released"})
    with tracking.mirror(Run.of(cfg), cfg):
        pass
    (given,) = asked
    assert (given["group"], given["job_type"]) == ("sweep", "baseline")
    assert given["tags"] == ["released", "smoke", "tiny", "bf16", "seed3"] and given["mode"] == "offline"
    assert given["dir"] == str(Run.of(cfg).path.resolve()) and given["finished"]


def test_a_server_out_of_reach_does_not_stop_a_run(config, asked, capsys):
    cfg = config(**{"logger.name": "wandb", "logger.mode": "online"})
    with tracking.mirror(Run.of(cfg), cfg):
        pass
    assert [given["mode"] for given in asked] == ["online", "offline"] and asked[1]["finished"]
    warning = capsys.readouterr().out
    assert warning.startswith("warning: ") and "No API key configured." in warning and warning.count("\n") == 1
