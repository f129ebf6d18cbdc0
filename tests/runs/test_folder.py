"""Run folders: what their names depend on, whose baseline is whose, one writer at a time, rows cut off by a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qat.analysis.compare import train_command
from qat.cli.validate import CHOICES
from qat.config import Config
from qat.errors import UserError
from qat.quant import scaling
from qat.quant.rules import RULES, Rule
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, identity, pretrained_of, run_id
from tests.conftest import RUNS


def renamed(config, words: tuple[str, ...] = (), **changes) -> bool:
    return run_id(config(*words)) != run_id(config(*words, **changes))


# ----------------------------------------------------------------------------------------------------------- names

CHANGES = {
    "seed": 1,
    "repeat": 1,
    "model.path": "elsewhere",
    "data.path": "elsewhere",
    "data.label_shift": "twice",
    "data.duplicate_workers": 2,
    "optim.lr": 2e-5,
    "optim.beta1": 0.8,
    "optim.beta2": 0.96,
    "optim.eps": 1e-6,
    "optim.weight_decay": 0.0,
    "optim.clip": 0.5,
    "optim.lr_warmup": 0.1,
    "optim.lr_from_zero": True,
    "optim.master_weights": False,
    "optim.moments": "bf16",
    "loss.distill": 0.5,
    "quant.format": "fp8_e5m2",
    "quant.scope": ["mlp.down_proj"],
    "quant.bf16_blocks": 4,
    "quant.bf16_also": [4],
    "quant.weights": False,
    "quant.activations": False,
    "quant.gradients": False,
    "quant.target_activation": 14.0,
    "quant.target_weight": 14.0,
    "quant.target_gradient": 14.0,
    "quant.overflow": "inf",
    "quant.ste": "masked",
    "quant.cage": 10.0,
    "quant.operands": "descaled",
    "quant.gemm": "fp8",
    "scaling.algo": "current",
    "scaling.window": 32,
    "scaling.tick": "call",
    "scaling.sync": "none",
    "quant.rounding": "hybrid",
    "scaling.update_every": 2,
    "scaling.guard": 1.0,
    "scaling.settle": 0.5,
    "scaling.observe_in_warmup": False,
    "scaling.discard_after_warmup": False,
    "warmup.bf16": 0.2,
    "budget.steps": 13,
    "budget.micro_batch": 4,
    "budget.accumulation": 1,
    "budget.seq_len": 64,
    "budget.steps_factor": 0.5,
    "budget.batch_factor": 0.5,
    "budget.compile": True,
    "budget.activation_checkpointing": True,
    "budget.largest_logits": 2**20,
}
SAME = {
    "experiment": "exp7",
    "protocol": "released",
    "seeds": [1, 2],
    "retrain": True,
    "run": "some/folder",
    "runs": ["some/folder"],
    "record": "some/folder",
    "validation": None,
    RUNS: "elsewhere",
    "model.name": "tiny",
    "model.licence": "other",
    "model.blocks": None,
    "data.name": "other",
    "data.tokenizer_threads": 4,
    "data.retry_hours": 1.0,
    "data.shuffle_buffer": 7,  # of streams only
    "budget.parallel": "fsdp",
    "budget.validation_tokens": 64,
    "budget.name": "other",
    "budget.checkpoint_every": 3,
    "budget.telemetry_every": 3,
    "budget.heldout_tokens": 512,
    "scaling.shadow": ["most_recent"],
    "optim.max_skipped": 99,
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_changes_a_number_changes_the_name(config, key):
    assert renamed(config, ("experiment=exp8",), **{key: CHANGES[key]})


# Groups of which a name reads nothing.
LEFT_OUT = ("report", "launch", "bench", "replay", "ptq", "export", "sensitivity", "dashboard", "logger", "benchmark")


def test_what_changes_no_number_leaves_the_name(config):
    cfg = config("experiment=exp8")
    assert run_id(dataclasses.replace(cfg, **dict.fromkeys(LEFT_OUT))) == run_id(cfg)
    assert [key for key, value in SAME.items() if renamed(config, ("experiment=exp8",), **{key: value})] == []


def test_every_setting_has_a_row():
    keys = set()
    for name, value in vars(Config()).items():
        group = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        keys |= {f"{name}.{field.name}" for field in group} or {name}
    rows = {*CHANGES, *SAME, *(key for _, key, *_ in BESIDE)}
    assert {key for key in keys if key.partition(".")[0] not in LEFT_OUT} == rows


HUB = {"data.source": "hub"}
BESIDE = [  # (what stands beside a key, the key, two values, whether they are two runs)
    ({"model.source": "hub", "model.path": "an/id"}, "model.revision", ("v1", "v2"), True),
    ({"data.source": "hub", "data.path": "an/id"}, "data.revision", ("v1", "v2"), True),
    ({"data.source": "hub", "data.path": "an/id"}, "data.subset", ("a", "b"), True),
    ({"data.path": "an/id"}, "data.source", ("package", "hub"), True),
    ({"model.path": "an/id"}, "model.source", ("package", "hub"), True),
    ({}, "model.architecture", ({"hidden_size": 16}, {"hidden_size": 32}), True),
    ({}, "budget.arithmetic", ("fp32", "bf16"), True),
    ({"optim.master_weights": False, "budget.arithmetic": "bf16"}, "optim.pure_bf16", (False, True), True),
    ({"quant.cage": 10.0}, "quant.cage_silent", (0.5, 0.8), True),
    ({"scaling.algo": "current"}, "scaling.window", (16, 64), False),
    ({"scaling.algo": "most_recent"}, "scaling.window", (16, 64), False),
    ({"scaling.algo": "exp_smooth"}, "scaling.window", (16, 64), False),
    ({"scaling.algo": "exp_smooth"}, "scaling.alpha", (0.5, 0.9), True),
    ({"scaling.algo": "current"}, "quant.ste", ("pass_through", "masked"), False),
    ({"quant.gradients": False}, "quant.target_gradient", (15.0, 224.0), False),
    ({"scaling.algo": "lsq"}, "scaling.lr", (0.1, 0.2), True),
    ({"warmup.bf16": 0.0}, "scaling.discard_after_warmup", (True, False), False),
    ({"warmup.bf16": 0.5}, "scaling.discard_after_warmup", (True, False), True),
    (HUB, "data.cache", (True, False), False),
    (HUB, "data.shuffle_buffer", (7, 8), True),
]


@pytest.mark.parametrize(("beside", "key", "values", "counts"), BESIDE)
def test_a_setting_counts_only_beside_what_reads_it(config, beside, key, values, counts):
    one, other = (run_id(config("experiment=exp8", **beside, **{key: value})) for value in values)
    assert (one != other) == counts


def test_a_new_rule_is_named_by_what_it_reads(config, monkeypatch):
    def median(history, scaling):
        return history[history[:, 0] > 0].median(0).values

    monkeypatch.setitem(CHOICES, "scaling.algo", (*CHOICES["scaling.algo"], "median"))
    monkeypatch.setitem(RULES, "median", Rule(median, entries=None, reads=("window",)))
    changes = {"scaling.algo": "median", "scaling.window": 3}
    cfg = config("experiment=exp8", **changes)
    assert run_id(config("experiment=exp8", **changes | {"scaling.window": 5})) != run_id(cfg)
    bank = scaling.ScaleBank(["layer/weight"], [15.0], cfg.scaling)
    for step, amax in enumerate((1.0, 4.0, 3.0, 5.0, 6.0), 1):
        bank.begin_step(step, 1)
        bank.amaxes[0].fill_(amax)
        bank.tick()
    assert bank.scale.item() == 15 / 5  # of the last three


def test_a_baseline_does_not_depend_on_how_its_runs_are_quantized(config):
    names = {
        run_id(baseline_of(config("experiment=exp8", **{key: CHANGES[key]}))) for key in CHANGES if "quant." in key
    }
    names |= {run_id(config("experiment=exp8", **{"quant.format": "none", "scaling.window": 3, "warmup.bf16": 0.5}))}
    assert names == {run_id(baseline_of(config("experiment=exp8")))}


def test_arithmetic_counts_as_what_it_comes_to(config, monkeypatch):
    monkeypatch.delenv("HIF8_ARITHMETIC", raising=False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    assert not renamed(config, (), **{"budget.arithmetic": "fp32"})
    assert renamed(config, (), **{"budget.arithmetic": "bf16"})
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    assert not renamed(config, (), **{"budget.arithmetic": "bf16"})


def test_names_are_readable(config):
    lead, _, digest = run_id(config("experiment=exp8")).rpartition("-")
    assert lead == "tiny-hif8-max-w64-warm1-lr1e-05-12steps-s0" and len(digest) == 10
    assert run_id(baseline_of(config("experiment=exp8"))).startswith("tiny-bf16-lr1e-05-12steps-s0-")
    released = config("experiment=exp3", "protocol=released", seed=7)
    assert run_id(released).startswith("tiny-hif8-most_recent-warm0-twice-lr0.0001-12steps-s7-")
    assert run_id(pretrained_of(released)).startswith("tiny-untouched-")
    other = config("experiment=exp8", "estimator=cage", "loss=distill")
    assert run_id(other).startswith("tiny-hif8-max-w64-warm1-cage-distill-lr1e-05-12steps-s0-")
    assert run_id(baseline_of(other)).startswith("tiny-bf16-distill-lr1e-05-12steps-s0-")
    assert other.variations == ["CAGE 10", "distillation 1"] and not released.variations
    again = config("experiment=exp8", repeat=2)
    assert "-12steps-s0-r2-" in run_id(again) and "-12steps-s0-r2-" in run_id(baseline_of(again))
    assert run_id(pretrained_of(again)) == run_id(pretrained_of(config("experiment=exp8")))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a b\nc", "..", ".hidden/../..", "x" * 500, "ünïcode"])
def test_a_name_cannot_leave_the_folder(config, tmp_path, name):
    cfg = config()
    cfg.model.name = name  # `validate` would refuse it
    for each in (cfg, baseline_of(cfg), pretrained_of(cfg)):
        path = Run.of(each).path
        assert path.resolve().parent == (tmp_path / "runs").resolve()
        assert len(path.name) < 100 and not set(path.name) & set("/\\ \n\0")


# ------------------------------------------------------------------------------------------------------- baselines


def test_a_baseline_matches_in_all_but_quantization(config):
    cfg = config("experiment=exp3", "protocol=released", **{"optim.lr": 3e-5, "seed": 4, "budget.batch_factor": 0.5})
    before = dataclasses.asdict(cfg)
    baseline = baseline_of(cfg)
    assert dataclasses.asdict(cfg) == before and not baseline.quantized
    ours, theirs = dataclasses.asdict(cfg), dataclasses.asdict(baseline)
    assert {key for key in ours if ours[key] != theirs[key]} == {"quant", "scaling"}
    own, matched = identity(cfg), identity(baseline)
    assert own.keys() - matched.keys() == {"quant", "scaling", "bf16_warmup_steps"}
    assert all(own[key] == matched[key] for key in matched)
    assert baseline_of(baseline) == baseline
    assert baseline_of(config("experiment=exp7")).bf16_warmup_steps == 0


def test_the_pretrained_checkpoint_is_one_for_all_runs_of_a_model(config):
    names = {run_id(pretrained_of(config("experiment=exp8", **{k: CHANGES[k]}))) for k in ("optim.lr", "budget.steps")}
    assert names == {run_id(pretrained_of(config()))}
    assert run_id(pretrained_of(config(seed=1))) not in names  # a random model's weights are its seed's
    package = {"model.source": "package", "model.path": "some/file"}
    assert run_id(pretrained_of(config(**package))) == run_id(pretrained_of(config(seed=1, **package)))


# --------------------------------------------------------------------------------------------------------- folders


def test_every_process_that_worked_on_a_run_is_remembered(config, monkeypatch):
    """A resume elsewhere, and evaluation that trains lost weights again: the latter's command trains nothing new."""
    cfg, first = config("experiment=exp8"), {"command": "scripts/train.py a=1", "cores": 2, "installed": {"x": "1"}}
    elsewhere = {"command": "scripts/train.py a=1", "cores": 8, "installed": {"x": "2"}}
    run = Run.of(cfg)
    for environment in (first, first, elsewhere, elsewhere | {"command": "scripts/eval.py run=x"}):
        monkeypatch.setattr("qat.utils.environment.describe_environment", lambda found=environment: dict(found))
        run.create(cfg)
    assert [each["cores"] for each in run.environments()] == [2, 8, 8] and "installed" not in run.environments()[0]
    assert run.environment()["installed"] == {"x": "2"} and train_command(run) == "python scripts/train.py a=1"


def test_a_folder_gives_its_configuration_back(config):
    cfg = config("experiment=exp8", **{"optim.lr": 3e-5, "data.tokenizer_threads": 3})
    run = Run.of(cfg)
    with run.lock():
        run.create(cfg)
    assert run.typed_config() == cfg and run.id == run_id(run.typed_config())
    assert run.environment()["packages"]["torch"] and not run.finished
    assert run.environments() == [run.environment()]
    with pytest.raises(UserError, match=r"not a run folder \(no config\.yaml\)"):
        Run(run.path.parent).typed_config()


DAMAGED = ["{", "[1", "\x00", "\udcff", "null", "[]", "words", '{"a": 1}\n{', "optim: {lr: fast}"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(tmp_path, content):
    run = Run(tmp_path)
    readers = {"status.json": run.status, "eval.json": run.evaluations, "metrics.jsonl": run.metrics}
    readers["config.yaml"] = run.typed_config
    for name, reader in readers.items():
        (tmp_path / name).write_text(content + "\n", errors="surrogateescape")
        with pytest.raises(UserError, match=rf"^[^\n]*/{name} is damaged \([^\n]*\); delete the run folder[^\n]*$"):
            reader()


def test_an_existing_configuration_is_not_overwritten(config):
    cfg = config("experiment=exp8")
    run = Run.of(cfg)
    run.create(cfg)
    cfg.experiment = "exp7"
    run.create(cfg)
    assert run.config()["experiment"] == "exp8"


def test_missing_files_read_as_empty(tmp_path):
    run = Run(tmp_path / "nothing")
    assert (run.config(), run.status(), run.environment(), run.evaluations()) == ({}, {}, {}, {})
    assert (run.metrics(), run.telemetry(), run.samples("smoke", "bf16", "mmlu")) == ([], [], [])
    assert not run.finished


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on a node since noon")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_says_for_whom_it_waits_until_the_first_ends(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    with run.lock():
        pass
    said, entered = [], []
    monkeypatch.setattr("builtins.print", lambda line, **_: said.append(line))

    def second():
        with run.lock():
            entered.append((run.path / ".lock").read_text())

    waiting = threading.Thread(target=second)
    command = [sys.executable, "-c", HOLD, str(run.path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        waiting.start()
        while not said and waiting.is_alive():
            time.sleep(0.002)
        assert entered == []
        holder.kill()
    waiting.join()
    line = "run: waiting for process 7 on a node since noon, which works on it; Ctrl-C stops waiting"
    assert said == [line] and entered[0].startswith(f"process {os.getpid()} on {platform.node()} since 20")


def rows(path: Path, count: int) -> str:
    text = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, count + 1))
    path.write_text(text)
    return text


def test_rows_after_the_last_checkpoint_are_dropped(tmp_path):
    text = rows(tmp_path / "metrics.jsonl", 6)
    Run(tmp_path).keep_rows("metrics.jsonl", 4)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(text.splitlines(keepends=True)[:4])
    Run(tmp_path).keep_rows("metrics.jsonl", 0)
    assert Run(tmp_path).metrics() == []
    Run(tmp_path).keep_rows("telemetry.jsonl", 4)
    assert Run(tmp_path).telemetry() == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_that_a_kill_cut_off_is_left_out(tmp_path, cut):
    text = rows(tmp_path / "metrics.jsonl", 5)
    (tmp_path / "metrics.jsonl").write_text(text[:-cut])
    assert [row["step"] for row in Run(tmp_path).metrics()] == [1, 2, 3, 4]
    Run(tmp_path).keep_rows("metrics.jsonl", 9)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(text.splitlines(keepends=True)[:4])


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.set_status("running", 3, 12)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        run.set_status("finished", 12, 12)
    assert run.status() == {"state": "running", "step": 3, "steps": 12}
