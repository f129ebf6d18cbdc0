"""Many runs: each after its baseline, what a failure stops, and what becomes of a suite and of its report."""

from __future__ import annotations

import gc
import itertools
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qat.cli import runner
from qat.errors import ConfigError, UserError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.runs.job import Job
from tests.cli.test_sweep import table
from tests.conftest import ROOT, TINY, wait_for

SUITE = ("suite.py", *TINY, "report.experiments=[exp7,exp8]", "report.out=report")


@pytest.fixture
def replaced(monkeypatch):
    """replaced(train): `train(cfg)` in the place of training, nothing in that of scoring; the ids that it gets."""

    def replace(train) -> list[str]:
        trained = []

        def work(cfg):
            trained.append(run_id(cfg))
            train(cfg)

        monkeypatch.setattr(runner, "train_with_baseline", work)
        monkeypatch.setattr(runner, "evaluate_and_compare", lambda _: None)
        return trained

    return replace


def test_a_baseline_comes_before_its_runs_and_a_failure_stops_only_what_needs_it(config, replaced, capsys):
    cells = itertools.product(("lr1e-4", "lr1e-5"), ("max", "current"))
    jobs = [Job(config(f"scaling={rule}", f"lr={rate}"), []) for rate, rule in cells]
    ids = [run_id(job.cfg) for job in jobs]
    baselines = [run_id(baseline_of(job.cfg)) for job in jobs[::2]]

    def train(cfg):
        if run_id(cfg) == ids[0]:
            raise RuntimeError("out of\nmemory")
        if run_id(cfg) == baselines[1]:
            raise UserError("the gradient is not finite")

    trained = replaced(train)
    scored = []
    outcomes = runner.complete(jobs, after=lambda: scored.append(trained[-1]))
    assert trained == [baselines[0], *ids[:2], baselines[1]] and scored == [ids[1]]
    assert {outcome.name: (outcome.state, outcome.reason) for outcome in outcomes} == {
        baselines[0]: ("done", ""),
        baselines[1]: ("failed", "the gradient is not finite"),
        ids[0]: ("failed", "RuntimeError: out of memory"),
        ids[1]: ("done", ""),
        **dict.fromkeys(ids[2:], ("failed", "its baseline failed: the gradient is not finite")),
    }
    assert [row.split()[:2] for row in table(capsys.readouterr().out)] == [[o.state, o.name] for o in outcomes]
    with pytest.raises(UserError, match="4 of 6 runs failed; the same command runs only what is missing"):
        runner.refuse_failed(outcomes)


def test_a_run_that_is_scored_on_two_benchmarks_is_scored_on_the_second_before_the_next_run(
    config, replaced, monkeypatch
):
    replaced(lambda _: None)
    scored = []
    monkeypatch.setattr(runner, "evaluate_and_compare", lambda cfg: scored.append((cfg.seed, cfg.benchmark.name)))
    asked = [("text", 0), ("letters", 0), ("text", 1)]
    jobs = [Job(config("experiment=exp8", f"benchmark={name}", f"seed={seed}"), []) for name, seed in asked]
    outcomes = runner.complete(jobs)
    assert scored == [(seed, name) for name, seed in asked for _ in range(2)]  # the baseline, and the run
    assert len(outcomes) == 6 and len({outcome.name for outcome in outcomes}) == 4


def test_the_time_left_is_reckoned_from_the_runs_before(config, replaced, monkeypatch, capsys):
    now = [0]
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: now[0]))
    replaced(lambda _: now.append(now.pop() + 600))
    runner.complete([Job(config("experiment=exp8", f"seed={seed}"), []) for seed in (0, 1)])
    lines = re.findall(r"^\[\d of 4\] [^\s,]+(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert lines == ["", *(f", about {minutes} min left" for minutes in (30, 20, 10))]


@pytest.mark.parametrize("name", ["factorial", "decide", pytest.param("audit", marks=pytest.mark.slow)])
def test_a_study_writes_its_page_and_says_what_failed(main, replaced, tmp_path, name):
    def train(cfg):
        if cfg.scaling.algo == "most_recent":
            raise UserError("the gradient is not finite")

    trained = replaced(train)
    code, out, stderr = main(f"{name}.py", *TINY, "report.out=report")
    assert len(trained) > 9 and code == 2 and "\nfailed: the gradient is not finite\n" in out
    assert stderr.endswith(" runs failed; the same command runs only what is missing\n")
    page = (tmp_path / "report" / name / f"{name}.md").read_text()
    assert f"\n{name}: report/{name}/{name}.md\n" in out
    assert re.search("^## (Missing|Not measured yet)$", page, re.MULTILINE)  # nothing was scored


@pytest.mark.parametrize("names", ["[exp7,exp8]", "[exp8]"])
def test_a_suite_reports_what_it_has_and_a_single_experiment_only_when_it_is_whole(main, replaced, tmp_path, names):
    def train(cfg):
        if cfg.experiment == "exp8":
            raise OSError(28, "No space left on device", "runs")

    replaced(train)
    code, out, stderr = main(*SUITE, f"report.experiments={names}")
    assert code == 2 and "runs: No space left on device" in out and "Traceback" not in stderr
    assert stderr.endswith(" runs failed; the same command runs only what is missing\n")
    assert (tmp_path / "report" / "report.md").exists() == (names != "[exp8]")


def preempted(_):
    os.kill(os.getpid(), signal.SIGTERM)


def stopped(_):
    raise KeyboardInterrupt


ENDS = [(preempted, 75, "preempted", "SIGTERM"), (stopped, 130, "stopped", "Ctrl-C")]


@pytest.mark.parametrize(("does", "code", "state", "reason"), ENDS)
def test_a_stop_ends_a_suite_and_the_table_says_where(main, replaced, tmp_path, does, code, state, reason):
    trained = replaced(lambda cfg: does(cfg) if cfg.quantized else None)
    left, out, _ = main(*SUITE)
    assert left == code and len(trained) == 2 and not (tmp_path / "report").exists()
    assert [line.split() for line in table(out)][:2] == [["done", trained[0]], [state, trained[1], reason]]
    assert table(out)[2].startswith(" not begun")


def test_what_so_many_ranks_cannot_train_is_refused_before_anything_is(config, replaced, monkeypatch):
    trained, job = replaced(lambda _: None), Job(config("experiment=exp8"), [])
    with pytest.raises(ConfigError, match=r"budget\.accumulation=2: 4 ranks cannot share"):
        runner.complete([job], ranks=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: start one process"):
        runner.complete([job])
    assert trained == []


def test_a_repeat_is_made_beside_its_original_and_the_report_is_the_originals(main, replaced, monkeypatch):
    trained, shown = replaced(lambda _: None), []
    monkeypatch.setattr("qat.report.page.write_report", lambda experiments, *_: (shown.extend(experiments), ""))
    assert main(*SUITE, "report.experiments=[exp8]", "seeds=[0,1]", "repeat=1")[0] == 0
    assert len(trained) == 8 and sum("-r1-" in name for name in trained) == 4
    (experiment,) = shown
    assert [run.id for run in experiment.runs] == [name for name in trained if "-hif8-" in name and "-r1-" not in name]


def test_memory_of_a_run_is_free_for_the_next(config, monkeypatch):
    """By what is alive after a run: no model, hence none of its parameters."""
    import torch

    alive = []
    attempt = runner.attempt

    def counted(*arguments):
        alive.append(sum(isinstance(each, torch.nn.Module) for each in gc.get_objects()))
        return attempt(*arguments)

    monkeypatch.setattr(runner, "attempt", counted)
    monkeypatch.setattr(runner, "evaluate_and_compare", lambda _: None)
    gc.collect()
    runner.complete([Job(config("experiment=exp8", f"seed={seed}", **{"budget.steps": 2}), []) for seed in (0, 1)])
    assert len(alive) == 4 and alive == alive[:1] * 4


@pytest.mark.slow
def test_with_ranks_each_run_is_a_torchrun_that_gets_the_signal_and_saves(texts, configure, tmp_path):
    """One minute. SIGTERM to the one process; the same command goes on and scores."""
    overrides = [*TINY, "quant=bf16", "budget.steps=40", "budget.checkpoint_every=1000", "report.experiments=[exp8]"]
    run = Run.of(configure(tmp_path / "runs", "experiment=exp8", *overrides[:-1]))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "suite.py"),
        *overrides,
        "data.source=files",
        f"data.path={texts}",
    ]
    command += ["launch.ranks=2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as suite:
        wait_for(lambda: len(run.metrics()) >= 3)
        suite.send_signal(signal.SIGTERM)
        out = suite.stdout.read()
    assert suite.returncode == 75 and table(out)[0].split() == ["preempted", run.id, "SIGTERM"]
    assert run.status()["state"] == "stopped" and any(run.checkpoints.iterdir())
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step" in done.stdout and table(done.stdout)[0].split() == ["done", run.id]
    assert run.environment()["ranks"] == 2
    assert [row["step"] for row in run.metrics()] == list(range(1, 41)) and run.evaluations()
