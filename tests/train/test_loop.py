"""Runs from nothing to a finished folder, and the same folder bit for bit after a stop at any moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qat.cli import runner
from qat.errors import UserError
from qat.eval.subject import Subject
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.train import checkpoint, loop, run_log
from qat.train.schedule import learning_rate
from qat.train.step import Trainer
from qat.utils import signals
from tests.conftest import RUNS, THREADS, TINY
from tests.helpers.steps import before_step, spoil, stopped
from tests.helpers.torture import left

BOTH = pytest.mark.usefixtures("arithmetic")

# A BF16 warmup of six steps, whose amaxes are kept; and three micro-batches a step of which each occurs twice, so that
# every second step ends between the two occurrences of one.
PAPER = ("experiment=exp8", "budget.accumulation=1", "warmup.bf16=0.5", "scaling.discard_after_warmup=false")
RELEASED = ("experiment=exp3", "protocol=released", "budget.accumulation=3", "budget.checkpoint_every=3")
RELEASED += ("budget.steps=5", "model.blocks=3", "model.architecture.num_hidden_layers=3")
RELEASED += ("+model.architecture.attention_dropout=0.1",)  # so the state of the RNG matters
VENDOR = ("experiment=exp4", "protocol=vendor", "model.blocks=2", "model.architecture.num_hidden_layers=2")
# Whatever has state or a schedule beside the defaults.
OTHER = (
    "experiment=exp8",
    "scaling=lsq",
    "estimator=cage",
    "quant.cage_silent=0.4",
    "loss.distill=0.5",
    "warmup.bf16=0",
)
OTHER += ("optim.moments=hif8", "budget.accumulation=1", "quant.bf16_blocks=0", *RELEASED[3:-1])


@pytest.fixture(scope="module")
def reference(configure, tmp_path_factory):
    """reference(words): the configuration of an uninterrupted run, trained once an arithmetic, after its baseline."""
    folder, done = tmp_path_factory.mktemp("reference"), set()

    def trained(words):
        cfg = configure(folder, *words)
        if Run.of(cfg).id not in done:
            runner.train_with_baseline(cfg)
            done.add(Run.of(cfg).id)
        return cfg

    return trained


def every_file(run: Run) -> dict:
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ------------------------------------------------------------------------------------------------------- whole runs


@BOTH
@pytest.mark.parametrize("words", [PAPER, RELEASED, VENDOR], ids=["paper", "released", "vendor"])
def test_a_run_and_its_baseline_leave_complete_folders(reference, words):
    cfg = reference(words)
    micro, accumulation = cfg.batch
    lost = 1 if cfg.data.label_shift == "twice" else 0
    for each in (cfg, baseline_of(cfg)):
        run = Run.of(each)
        assert run.status() == {"state": "finished", "step": cfg.steps, "steps": cfg.steps}
        assert run.typed_config() == each and run.environment()["packages"]["torch"]
        rows = run.metrics()
        assert [row["step"] for row in rows] == list(range(1, cfg.steps + 1))
        tokens = micro * accumulation * (cfg.budget.seq_len - lost)
        assert [row["tokens"] for row in rows] == [tokens * row["step"] for row in rows]
        assert [row["lr"] for row in rows] == [learning_rate(cfg, row["step"]) for row in rows]
        first = cfg.bf16_warmup_steps + 1
        assert [row["quantized"] for row in rows] == [each.quantized and row["step"] >= first for row in rows]
        assert all((row["overshoot_max"] is not None) == row["quantized"] for row in rows)
        assert all(4.5 < row["loss"] < 6.5 and 0 < row["grad_norm"] < 50 for row in rows)
        (path,) = run.checkpoints.iterdir()
        files = {"facts.json", "model.safetensors"} | ({"scales.safetensors"} if each.quantized else set())
        assert {file.name for file in path.iterdir()} == files
        assert checkpoint.load(path)[1]["step"] == cfg.steps
    names, amax = Run.of(cfg).amaxes()
    assert amax.shape == (cfg.steps, len(names)) and (amax > 0).all()
    looked = [row for row in Run.of(cfg).telemetry() if "role" in row]
    at = [(row["step"] - 1, names.index(f"{row['layer']}/{row['role']}")) for row in looked]
    assert looked and [row["amax"] for row in looked] == [amax[place] for place in at]
    assert not (Run.of(baseline_of(cfg)).path / "amax.safetensors").exists()


@BOTH
def test_a_quantized_run_is_its_baseline_until_quantization_starts(reference):
    """House rule 4: in the BF16 warmup a converted model is the original bit for bit, forward and backward."""
    cfg = reference(PAPER)
    ours, theirs = ([(r["loss"], r["grad_norm"]) for r in Run.of(each).metrics()] for each in (cfg, baseline_of(cfg)))
    assert cfg.bf16_warmup_steps == 6 and ours[:6] == theirs[:6]
    assert all(q != b and abs(q - b) < 0.01 for (q, _), (b, _) in zip(ours[6:], theirs[6:], strict=True))


def test_telemetry_is_written_when_it_is_due(reference):
    cfg = reference(PAPER)
    rows = [row for row in Run.of(cfg).telemetry() if "text" not in row]
    assert sorted({row["step"] for row in rows}) == [7, 11, 12]
    tensors = [(row["layer"], row["role"]) for row in rows if row["step"] == 11 and "role" in row]
    # 3 roles of the MLP's 3 linears in blocks 3, 4 and 5, two of which share their input.
    assert len(tensors) == len(set(tensors)) == 3 * 8
    # The scale is the one the tensor was rounded with, not the one that its amax led to.
    assert all(row["overshoot"] == pytest.approx(row["amax"] * row["scale"] / 15) for row in rows if "role" in row)
    baseline = [row for row in Run.of(baseline_of(cfg)).telemetry() if "text" not in row]
    assert [row["step"] for row in baseline] == [1, 5, 9, 12] and all(row["updated"] for row in baseline)


def test_under_the_vendors_protocol_every_linear_is_scaled_and_held(reference):
    """Scale gradients to 224; an octave of headroom leaves few tensors beyond it in ten steps."""
    rows = [row for row in Run.of(reference(VENDOR)).telemetry() if "role" in row and row["step"] > 1]
    assert len({row["layer"] for row in rows}) == 2 * 7
    targets = {"activation": 15, "weight": 15, "gradient": 224}
    assert all(row["overshoot"] == pytest.approx(row["amax"] * row["scale"] / targets[row["role"]]) for row in rows)
    scales = {step: [row["scale"] for row in rows if row["step"] == step] for step in (5, 9, 12)}
    assert scales[5] == scales[9] != scales[12]
    assert sum(row["overshoot"] > 1 for row in rows if row["step"] == 5) < 0.1 * len(scales[5])


def test_a_run_in_pure_bf16_is_stored_resumed_and_scored_as_such(configure, tmp_path):
    words = ("experiment=exp3", "optim.pure_bf16=true", "optim.master_weights=false", "quant.bf16_blocks=1")
    words += ("budget.arithmetic=bf16",)
    words += ("model.blocks=2", "model.architecture.num_hidden_layers=2", "budget.steps=3", "budget.checkpoint_every=1")
    whole, again = (configure(tmp_path / name, *words) for name in ("whole", "again"))
    loop.train(whole)
    stopped(again, 3)
    loop.train(again)
    weights = [checkpoint.latest(Run.of(cfg).checkpoints)[0]["model"] for cfg in (whole, again)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert {weight.dtype for weight in weights[0].values()} == {torch.bfloat16}
    model, _ = Subject(whole, Run.of(whole), "bf16").build()
    assert all(torch.equal(p.bfloat16(), weights[0][name]) for name, p in model.named_parameters())


def test_a_run_repeats_itself_bit_for_bit_on_two_threads(configure, tmp_path, request):
    request.addfinalizer(lambda: torch.set_num_threads(THREADS))
    torch.set_num_threads(2)
    words = ("experiment=exp8", "budget.steps=3", "budget.micro_batch=4", "budget.seq_len=128")  # enough for two
    one, two = (loop.train(configure(tmp_path / name, *words)) for name in ("one", "two"))
    assert left(one) == left(two)


def test_the_same_command_again_touches_nothing(reference, capsys):
    cfg = reference(PAPER)
    folders = [Run.of(baseline_of(cfg)), Run.of(cfg)]
    before = [every_file(run) for run in folders]
    capsys.readouterr()
    assert [run.id for run in runner.train_with_baseline(cfg)] == [run.id for run in folders]
    assert [run.id for run in runner.train_with_baseline(baseline_of(cfg))] == [folders[0].id]  # its own baseline
    said = [*folders, folders[0]]
    assert capsys.readouterr().out == "".join(f"{run.id}: finished already\n" for run in said)
    assert [every_file(run) for run in folders] == before


# --------------------------------------------------------------------------------------------------- stops and resumes


def before_checkpoint(number, monkeypatch):
    real = checkpoint.Writer.save

    def save(writer, step, *rest):
        if step == number:
            raise KeyboardInterrupt
        real(writer, step, *rest)

    monkeypatch.setattr(checkpoint.Writer, "save", save)


def after_checkpoint(number, monkeypatch):
    real = checkpoint.Writer.save

    def save(writer, step, *rest):
        real(writer, step, *rest)
        if step == number:
            raise KeyboardInterrupt  # while it is written, maybe

    monkeypatch.setattr(checkpoint.Writer, "save", save)


def after_last_checkpoint(number, monkeypatch):
    real = checkpoint.save

    def save(folder, step, *rest, **more):
        path = real(folder, step, *rest, **more)
        if step == number:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save", save)


STOPS = [  # (run, where it is stopped, the step, rows that are there then, the step it resumes from)
    (PAPER, before_step, 3, 2, 0),
    (PAPER, before_step, 7, 6, 4),
    (PAPER, before_checkpoint, 8, 8, 4),
    (PAPER, after_checkpoint, 8, 8, 8),
    (RELEASED, before_step, 5, 4, 3),
    (OTHER, before_step, 5, 4, 3),
]


@BOTH
@pytest.mark.parametrize(("words", "where", "number", "rows", "resumed"), STOPS)
def test_a_stopped_run_ends_like_an_uninterrupted_one(reference, config, words, where, number, rows, resumed, capsys):
    cfg = config(*words)
    run = Run.of(cfg)
    stopped(cfg, number, where)
    assert run.status()["state"] == "stopped" and len(run.metrics()) == rows
    if words == RELEASED:  # in the middle of a micro-batch's occurrences
        cursor = json.loads((run.checkpoints / "step-00000003" / "facts.json").read_text())["data"]
        assert cursor["repeats"] == 1
    capsys.readouterr()
    loop.train(cfg)
    said = f"resuming after step {resumed} of {cfg.steps}"
    assert (said in capsys.readouterr().out) == (resumed > 0)
    assert left(run) == left(Run.of(reference(words)))


def test_no_checkpoint_outlives_the_rows_before_it(config, monkeypatch):
    """Not even if the machine fails: they are on the disk when the last one takes the place of the others."""
    done, real = [], checkpoint.save
    noted = SimpleNamespace(flush=lambda path: done.append((path.name, len(path.read_bytes().splitlines()))))
    monkeypatch.setattr(run_log, "files", noted)
    monkeypatch.setattr(checkpoint, "save", lambda *rest, **how: done.append("saved") or real(*rest, **how))
    cfg = config(*PAPER)
    loop.train(cfg)
    assert done[-1] == "saved" and ("metrics.jsonl", cfg.steps) in done[-4:-1]


def test_a_run_stopped_on_its_last_metres_keeps_its_last_checkpoint(reference, config, monkeypatch):
    cfg = config(*PAPER)
    run = Run.of(cfg)
    stopped(cfg, cfg.steps, after_last_checkpoint)
    assert run.status()["state"] == "stopped" and checkpoint.latest(run.checkpoints)[1]["step"] == cfg.steps
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: pytest.fail("the only checkpoint was written again"))
    loop.train(cfg)
    assert left(run) == left(Run.of(reference(PAPER)))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_a_resumed_run_maps_no_checkpoint_and_finishes_where_none_can_be_removed(reference, config, monkeypatch):
    cfg = config(*PAPER)
    run = stopped(cfg, 7)
    real, mapped = loop._Session.steps, []

    def steps(session, log):
        mapped.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if run.id in line)
        return real(session, log)

    def busy(*_, ignore_errors=False, **__):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "steps", steps)
        patch.setattr(shutil, "rmtree", busy)
        loop.train(cfg)
        assert run.finished and not mapped
        run.set_status("running", cfg.steps, cfg.steps)  # as if it were stopped before it could say so
        loop.train(cfg)
    assert run.finished
    checkpoint.keep_newest(run.checkpoints, 1)
    assert left(run) == left(Run.of(reference(PAPER)))


def test_a_resume_survives_a_damaged_checkpoint_and_a_line_cut_off(reference, config, capsys):
    cfg = config(*PAPER)
    run = stopped(cfg, 11)
    newest = run.checkpoints / "step-00000008" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    for name in ("metrics.jsonl", "telemetry.jsonl"):
        with (run.path / name).open("a") as file:
            file.write('{"step": 11, "lo')
    capsys.readouterr()
    loop.train(cfg)
    out = capsys.readouterr().out
    assert "optimizer.safetensors is damaged" in out and "resuming after step 4 of 12" in out
    assert left(run) == left(Run.of(reference(PAPER)))


def signal_in_step(number: int, quantized: bool, monkeypatch) -> None:
    real = Trainer.step

    def step(self, current, batches, **how):
        if current == number and (self.bank is not None) == quantized:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, current, batches, **how)

    monkeypatch.setattr(Trainer, "step", step)


def test_a_scheduler_that_asks_gets_a_saved_run_and_a_code_to_requeue_on(reference, texts, configure, tmp_path, main):
    words = [*PAPER, "budget.checkpoint_every=1000"]  # nothing but the signal makes it save
    run = Run.of(configure(tmp_path, *PAPER))
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(3, True, patch)
        words += ["data.source=files", f"data.path={texts}", f"{RUNS}={tmp_path}"]
        code, _, stderr = main("train.py", *TINY, *words)
    said = "SIGTERM after step 3 of 12"
    assert code == 75 and stderr.splitlines()[-1] == f"{said}: saved; the same command continues"
    assert run.status() == {"state": "stopped", "step": 3, "steps": 12, "reason": said}
    assert checkpoint.latest(run.checkpoints)[1]["step"] == len(run.metrics()) == 3
    loop.train(configure(tmp_path, *PAPER))
    assert left(run) == left(Run.of(reference(PAPER)))


def test_a_signal_in_the_last_step_finishes_the_run_and_still_stops_the_command(config, monkeypatch):
    cfg = config("experiment=exp8")
    signal_in_step(cfg.steps, False, monkeypatch)
    with pytest.raises(signals.Preempted, match="SIGTERM after step 12 of 12"):
        runner.train_with_baseline(cfg)
    baseline = Run.of(baseline_of(cfg))
    assert baseline.status() == {"state": "finished", "step": 12, "steps": 12}
    assert not Run.of(cfg).path.exists()


# ------------------------------------------------------------------------------------------------------------ failures


def test_losses_that_are_not_finite_stop_the_run_and_say_so(config, monkeypatch):
    cfg = config(**{"quant.format": "none", "optim.max_skipped": 2})
    spoil((6, 7, 8), monkeypatch)
    with pytest.raises(UserError) as caught:
        loop.train(cfg)
    line = str(caught.value)
    assert line.startswith("step 8: the gradient is not finite (loss nan)") and "\n" not in line
    assert "3 in a row; lower optim.lr=0.0001" in line
    run = Run.of(cfg)
    assert run.status() == {"state": "failed", "step": 7, "steps": 12, "reason": line}
    assert [row["skipped"] for row in run.metrics()] == [False] * 5 + [True] * 2
    assert checkpoint.latest(run.checkpoints)[1]["step"] == 4


def test_a_skipped_step_of_a_baseline_has_no_telemetry_to_warn_of(config, monkeypatch):
    spoil((5,), monkeypatch)
    run = loop.train(config(**{"quant.format": "none"}))
    looked = [row["step"] for row in run.telemetry() if "updated" in row]
    assert looked == [1, 9, 12] and "lost updates" not in {row["kind"] for row in run.warnings()}


def test_a_step_without_a_finite_loss_is_skipped_and_counted(config, monkeypatch, capsys):
    cfg = config("experiment=exp8", **{"warmup.bf16": 0.0})
    spoil((3,), monkeypatch)
    run = loop.train(cfg)
    row = run.metrics()[2]
    assert run.finished and (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, True)
    assert sum(row["skipped"] for row in run.metrics()) == 1
    assert "warning: step 3: the gradient is not finite (loss nan), weights were not changed" in capsys.readouterr().out
    assert [bool(np.isnan(row).all()) for row in run.amaxes()[1]] == [number == 2 for number in range(cfg.steps)]
    scales = checkpoint.latest(run.checkpoints)[0]["scales"]
    assert scales["counters"].tolist()[0] == cfg.steps - 1  # eleven entries in the history, not twelve
    assert all(tensor.isfinite().all() for tensor in checkpoint.latest(run.checkpoints)[0]["model"].values())
