"""The suite as job arrays: what is submitted, what a job runs, and who is requeued. tests/helpers/slurm.py is the
cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from hydra import initialize_config_dir

from qat.cli import entry, experiments
from qat.config import register
from qat.errors import ConfigError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.train import loop
from tests.conftest import ROOT, TINY
from tests.helpers import slurm

SUITE = ["make", "--no-print-directory", "suite", "LAUNCHER=slurm", "READY="]
SOME = ["exp2", "exp4", "exp6", "exp1"]  # two sweeps, and two recipes that are one run


def test_every_run_of_the_suite_is_a_job_once_and_its_baseline_comes_before_it(monkeypatch):
    register()
    words = [*TINY, "quant.scope=[mlp.*]"]
    with initialize_config_dir(entry.CONF, version_base="1.3"):
        baselines, runs = experiments.jobs(SOME, words)
        cells = [cell for name in SOME for cell in experiments.configs_of(name, words)]
        jobs = [[experiments._compose(job) for job in jobs] for jobs in (baselines, runs)]
        (chosen,), _ = experiments.jobs(["exp8"], [*words, "quant=fp8_e4m3"])
        assert not experiments._compose(chosen).quantized
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(ConfigError, match=r"budget\.accumulation=2: 4 ranks cannot share"):
            experiments.jobs(["exp8"], words)
    assert [cfg.quantized for cfg in jobs[0]] == [False] * len(baselines) and all(cfg.quantized for cfg in jobs[1])
    ids = [[run_id(cfg) for cfg in each] for each in jobs]
    assert sorted(ids[0]) == sorted({run_id(baseline_of(cell)) for cell in cells})
    assert sorted(ids[1]) == sorted({run_id(cell) for cell in cells if cell.quantized})


@pytest.fixture
def cluster(tmp_path):
    """(folder of the commands, environment, a PY that notes what it is asked to run, and makes a `hard` job's first
    try end as one that saved upon a signal)."""
    environment = slurm.install(tmp_path / "bin")
    python = tmp_path / "bin" / "python"
    python.write_text(f"""#!/bin/bash
case "$1" in scripts/jobs.py) exec {shlex.quote(sys.executable)} "$@" ;; esac
printf '%s\\n' "$SLURM_ARRAY_TASK_ID ${{SLURM_RESTART_COUNT:-0}} $*" >> {tmp_path}/ran
case "$*" in *train.py*exp8*seed=1*) [ -n "$SLURM_RESTART_COUNT" ] || {{ touch "$HIF8_REQUEUE"; exit 1; }} ;; esac
case "$*" in *train.py*exp3*) exit 2 ;; esac
""")
    python.chmod(0o755)
    return tmp_path / "bin", environment, python


@pytest.mark.slow
def test_the_suite_is_submitted_baselines_first_and_what_was_saved_is_requeued(cluster, tmp_path):
    folder, environment, python = cluster
    words = f"runs_dir={tmp_path}/runs report.experiments=[exp3,exp8] 'quant.scope=[mlp.*]' model=tiny"
    size = ["NODES=2", "RANKS=4", "BUDGET=paper", "SEEDS=0,1", f"ARGS={words}", "SBATCH=--partition=gpu --time=1:00"]
    done = subprocess.run([*SUITE, f"PY={python}", *size], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("4 baselines and 4 runs are queued"), done.stderr

    told = slurm.submitted(folder)
    what = [(each["array"], each.get("dependency"), each["nodes"], each["gpus-per-node"]) for each in told]
    assert what == [
        ("0-3", None, "2", "4"),
        ("0-3", "afterany:100", "1", "1"),
        ("4-7", "afterany:100", "2", "4"),
        ("4-7", "afterany:300:200", "1", "1"),
        ("8", "afterany:400", "1", "1"),
    ]
    for each in told:
        assert each["time"] == "1:00" and each["partition"] == "gpu" and each["signal"] == "USR1@300"
        assert "requeue" in each and each["open-mode"] == "append" and each["export"] == "ALL"

    ran = (tmp_path / "ran").read_text().splitlines()
    trained = [line.split() for line in ran if "train.py" in line]
    assert [(each[0], each[1]) for each in trained[::2]] == [(each[0], each[1]) for each in trained[1::2]]  # two nodes
    tries = [("0", "0"), ("1", "0"), ("2", "0"), ("3", "0"), ("3", "1")]  # exp8's baseline at seed 1
    tries += [("4", "0"), ("5", "0"), ("6", "0"), ("7", "0"), ("7", "1")]
    assert [(each[0], each[1]) for each in trained[::2]] == tries
    for each in trained:
        assert each[2:4] == ["-m", "torch.distributed.run"] and {"--nnodes=2", "--nproc-per-node=4"} <= set(each)
        assert "quant.scope=[mlp.*]" in each and "hydra.mode=RUN" in each
    assert len({next(w for w in each if w.startswith("--rdzv-endpoint=localhost:2")) for each in trained}) == 8
    scored = [line.split() for line in ran if "eval.py" in line]
    assert [each[0] for each in scored] == list("01234567") and all(each[2] == "scripts/eval.py" for each in scored)
    assert ran[-1].startswith("8 0 scripts/report.py report.out=report report.seeds=[0,1] budget=paper")
    assert not list((tmp_path / "runs").rglob("requeue-*"))


def test_a_suite_that_cannot_be_submitted_says_so(cluster, tmp_path):
    folder, environment, python = cluster

    def said(*words: str) -> str:
        done = subprocess.run([*SUITE, f"PY={python}", *words], cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 2 and not (folder / "submitted.jsonl").exists()
        return (done.stdout + done.stderr).decode()

    assert "error: budget.accumulation=64: 3 ranks" in said("RANKS=3", f"ARGS=runs_dir={tmp_path}", "BUDGET=paper")
    assert "error: LAUNCHER=local: the suite takes basic or slurm" in said("LAUNCHER=local")


@pytest.mark.slow
def test_a_run_on_two_nodes_saves_upon_the_signal_is_requeued_and_goes_on(texts, configure, tmp_path):
    """One minute: torchrun on either `node`, which get the signal that SLURM sends before the time limit."""
    words = [*TINY, "quant=bf16", "budget.steps=40", "budget.checkpoint_every=1000"]
    run = Run.of(configure(tmp_path / "runs", *words))
    line = ["hydra.mode=RUN", *words, f"runs_dir={tmp_path}/runs", "data.source=files", f"data.path={texts}"]
    (tmp_path / "jobs").write_text(f"{shlex.join(line)}\n")
    environment = slurm.install(tmp_path / "bin") | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    environment |= {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"}
    options = ["--array=0", "--nodes=2", "--cpus-per-task=1", f"--output={tmp_path}/log-%a"]
    job = ["scripts/slurm_job.sh", sys.executable, "1", str(tmp_path), "train.py"]
    with subprocess.Popen(["sbatch", *options, *job], cwd=ROOT, env=environment) as queued:
        deadline = time.monotonic() + 120
        while len(run.metrics()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in (tmp_path / "bin" / "processes").read_text().split():
            os.kill(int(process), signal.SIGUSR1)
        queued.wait(240)
    log = (tmp_path / "log-0").read_text()
    assert log.count("resuming after step") == 1 and run.finished, log
    assert run.environment()["ranks"] == 2 and [row["step"] for row in run.metrics()] == list(range(1, 41))
    alone = loop.train(configure(tmp_path / "alone", *words)).metrics()
    assert [row["loss"] for row in run.metrics()] == pytest.approx([row["loss"] for row in alone], abs=5e-5)
