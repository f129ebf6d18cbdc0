"""The suite as job arrays: what is submitted, what a job runs, and who is requeued. tests/helpers/slurm.py is the
cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys

import pytest
from hydra import compose

from qat.cli import entry, experiments
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.runs.job import with_baselines
from qat.train import loop
from tests.conftest import ROOT, TINY, composing, wait_for
from tests.helpers import slurm

SUITE = ["make", "--no-print-directory", "suite", "LAUNCHER=slurm", "READY="]
SOME = ["exp2", "exp4", "exp6", "exp1"]  # two sweeps, and two recipes that are one run


def test_the_overrides_of_a_job_compose_to_its_run_and_a_baseline_comes_first():
    """Also where the command line names a format, by a group or a key, beside which a baseline has none."""
    given = [[*TINY, "quant.scope=[mlp.*]"], [*TINY, "quant=fp8_e4m3"], [*TINY, "quant.format=fp8_e5m2"]]
    with composing():
        jobs = [job for name in SOME for job in experiments.jobs_of(name, given[0])]
        jobs += [job for overrides in given[1:] for job in experiments.jobs_of("exp8", overrides)]
        submitted = with_baselines(jobs)
        composed = [entry.typed_config(compose("train", job.overrides)) for job in submitted.values()]
    assert [(run_id(cfg), cfg.benchmark.name) for cfg in composed] == list(submitted)
    places = [name for name, _ in submitted]
    assert all(places.index(run_id(baseline_of(job.cfg))) <= places.index(run_id(job.cfg)) for job in jobs)
    assert len(submitted) == len({run_id(cfg) for job in jobs for cfg in (job.cfg, baseline_of(job.cfg))})


@pytest.fixture
def cluster(tmp_path):
    """(folder of the commands, environment with a Python for jobs that notes what it is asked to run, and makes a
    `hard` job's first try end as one that saved upon a signal)."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
printf '%s\\n' "$SLURM_ARRAY_TASK_ID ${{SLURM_RESTART_COUNT:-0}} $*" >> {tmp_path}/ran
case "$*" in *train.py*exp8*seed=1*) [ -n "$SLURM_RESTART_COUNT" ] || {{ touch "$HIF8_REQUEUE"; exit 1; }} ;; esac
case "$*" in *train.py*exp3*) exit 2 ;; esac
""")
    python.chmod(0o755)
    return tmp_path / "bin", slurm.install(tmp_path / "bin") | {"FAKE_PYTHON": str(python)}


@pytest.mark.slow
def test_the_suite_is_submitted_baselines_first_and_what_was_saved_is_requeued(cluster, tmp_path):
    folder, environment = cluster
    words = f"runs_dir={tmp_path}/runs report.experiments=[exp3,exp8] 'quant.scope=[mlp.*]' model=tiny"
    size = ["NODES=2", "RANKS=4", "BUDGET=paper", "SEEDS=0,1", f"ARGS={words}", "SBATCH=--partition=gpu --time=1:00"]
    done = subprocess.run(
        [*SUITE, f"PY={sys.executable}", *size], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "\n4 baselines and 4 runs are queued" in done.stdout, done.stderr

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
    assert ran[-1].startswith("8 0 scripts/report.py seeds=[0,1] budget=paper protocol=paper")
    assert not list((tmp_path / "runs").rglob("requeue-*"))


def test_a_suite_that_cannot_be_submitted_says_so(cluster, main, monkeypatch, tmp_path):
    folder, environment = cluster
    for name in ("PATH", "FAKE_SLURM"):
        monkeypatch.setenv(name, environment[name])
    submission = ["suite.py", "launch.launcher=slurm", "report.experiments=[exp8]", "budget=paper", "data=embedded"]
    code, _, stderr = main(*submission, "launch.ranks=3")
    assert code == 2 and "error: budget.accumulation=64: 3 ranks" in stderr
    (folder / "sbatch").write_text("#!/bin/sh\necho 'no such account' >&2; exit 1\n")
    code, _, stderr = main(*submission)
    assert code == 2 and stderr == "no such account\nerror: sbatch: ended with exit code 1; it says why above\n"
    assert not (folder / "submitted.jsonl").exists()


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
        wait_for(lambda: len(run.metrics()) >= 3)
        for process in (tmp_path / "bin" / "processes").read_text().split():
            os.kill(int(process), signal.SIGUSR1)
        queued.wait(240)
    log = (tmp_path / "log-0").read_text()
    assert log.count("resuming after step") == 1 and run.finished, log
    assert run.environment()["ranks"] == 2 and [row["step"] for row in run.metrics()] == list(range(1, 41))
    alone = loop.train(configure(tmp_path / "alone", *words)).metrics()
    assert [row["loss"] for row in run.metrics()] == pytest.approx([row["loss"] for row in alone], abs=5e-5)
