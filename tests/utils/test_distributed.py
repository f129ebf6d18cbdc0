"""The same steps on one, two and four ranks: the same tokens, amaxes and checkpoints, and losses to rounding."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from qat.errors import UserError
from qat.runs.folder import Run
from qat.utils import device, distributed, environment
from tests.conftest import ROOT, RUNS, TINY
from tests.helpers.on_ranks import RUNS as ON_RANKS
from tests.helpers.on_ranks import STOP, free_port, run_module

MANY = ["ddp2", "ddp4", "fsdp2", pytest.param("compiled", marks=pytest.mark.slow), "fsdp2 compiled"]


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def arithmetic(request):
    """As conftest's, but that BF16 takes another minute and a half."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIF8_ARITHMETIC", request.param)
        yield request.param


@pytest.fixture(scope="module")
def seen(arithmetic, texts, tmp_path_factory):
    """seen(run, rank): what a rank of a run of `tests.helpers.on_ranks` saw; all run once, for the whole file, but for
    slow ones that no test asks for."""
    folder = tmp_path_factory.mktemp("ranks")
    run_module("on_ranks", texts, folder)

    def read(name: str, rank: int = 0) -> dict:
        file = folder / f"{name}.{rank}.json"
        if not file.exists():
            run_module("on_ranks", texts, folder, name)
        return json.loads(file.read_text())

    read.runs = folder / "runs"
    return read


def steps(seen, name: str, rank: int = 0) -> list[SimpleNamespace]:
    found = seen(name, rank)
    assert found["error"] is None
    return [SimpleNamespace(**step) for step in found["steps"]]


@pytest.mark.parametrize("name", MANY)
def test_the_ranks_of_a_step_share_out_its_sequences(seen, name):
    size = ON_RANKS[name][0]
    for number, step in enumerate(steps(seen, name)):
        shares = [steps(seen, name, rank)[number].sequences for rank in range(size)]
        whole = steps(seen, "one")[number]
        assert step.step == whole.step
        assert [row for share in shares for row in share] == whole.sequences
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("name", MANY)
def test_the_first_amaxes_are_the_same_on_any_number_of_ranks_and_the_rest_to_rounding(seen, name):
    one = steps(seen, "one")
    for rank in range(ON_RANKS[name][0]):
        ours = steps(seen, name, rank)
        assert ours[0].newest == one[0].newest and ours[0].scale == one[0].scale
        assert len(ours) >= 2
        for step, wanted in zip(ours, one, strict=False):
            assert step.filled == wanted.filled == step.step
            assert step.loss == pytest.approx(wanted.loss, abs=5e-5)
            assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)
            assert step.scale == pytest.approx(wanted.scale, rel=1e-3)


@pytest.mark.parametrize("name", MANY)
def test_all_ranks_hold_the_same_scales_loss_and_gradient_norm(seen, name):
    first = steps(seen, name)
    for rank in range(1, ON_RANKS[name][0]):
        for ours, theirs in zip(steps(seen, name, rank), first, strict=True):
            assert (ours.scale, ours.loss, ours.grad_norm) == (theirs.scale, theirs.loss, theirs.grad_norm)


@pytest.mark.parametrize("name", ["ddp4", "fsdp2"])
def test_updates_are_counted_over_whole_weights_on_any_number_of_ranks(seen, name):
    runs = [Run(next((seen.runs / each).iterdir())) for each in ("one", name)]
    one, ours = ([row["updated"] for row in run.telemetry() if "updated" in row] for run in runs)
    assert one and all(0 < row["stored"] <= 1 for row in one)
    assert [list(row.values()) for row in ours] == [pytest.approx(list(row.values()), abs=2e-3) for row in one]


@pytest.mark.parametrize("name", ["ddp2", "ddp4", "fsdp2"])
def test_held_out_texts_have_the_same_losses_on_any_number_of_ranks(seen, name):
    runs = [Run(next((seen.runs / each).iterdir())) for each in ("one", name)]
    one, ours = ([row for row in run.telemetry() if "text" in row] for run in runs)
    assert [(row["step"], row["text"]) for row in ours] == [
        (step, text) for step in (0, 2, 4, 6) for text in ("embedded", "wikipedia")
    ]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in one], abs=5e-5)


def test_rules_tried_beside_the_own_change_nothing_on_any_rank(seen):
    for rank in (0, 1):
        assert steps(seen, "ddp2 shadow", rank) == steps(seen, "ddp2", rank)


@pytest.mark.parametrize("name", ["ddp2 shadow", "ddp4"])
def test_rules_tried_beside_the_own_give_the_same_on_any_number_of_ranks(seen, name):
    runs = [Run(next((seen.runs / each).iterdir())) for each in ("one", name)]
    one, ours = ([row for row in run.telemetry() if "shadow" in row] for run in runs)
    assert [(row["step"], row["shadow"]) for row in ours] == [
        (step, rule) for step in (3, 5, 6) for rule in ("most_recent", "max:4")
    ]
    for key, error in (("loss", 5e-5), ("unquantized", 5e-5), ("cosine", 1e-4), ("norm_error", 1e-3)):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in one], abs=error)
    traces = [run.amaxes() for run in runs]
    assert traces[0][0] == traces[1][0] and traces[1][1] == pytest.approx(traces[0][1], rel=1e-3)


def test_unrounded_weights_can_be_sharded(seen):
    one, two = steps(seen, "unrounded1"), steps(seen, "unrounded2")
    assert [step.loss for step in two] == pytest.approx([step.loss for step in one], abs=5e-5)


@pytest.mark.parametrize("name", ["other ddp2", "other fsdp2"])
def test_cage_and_a_teacher_are_the_same_on_any_number_of_ranks(seen, name):
    one, ours = steps(seen, "other1"), steps(seen, name)
    assert len({step.loss for step in one}) == 4
    for step, wanted in zip(ours, one, strict=True):
        assert step.loss == pytest.approx(wanted.loss, rel=1e-4)
        assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-2)
        assert step.scale == pytest.approx(wanted.scale, rel=1e-3)


@pytest.mark.parametrize(("after", "name"), [("fsdp2 stopped", "then 4"), ("ddp4 stopped", "then 1")])
def test_a_checkpoint_continues_on_another_number_of_ranks(seen, after, name):
    one, before, ours = steps(seen, "one"), steps(seen, after), steps(seen, name)
    assert [step.step for step in before + ours] == [1, 2, 3, 4, 5, 6] and ours[0].step == STOP
    assert [step.loss for step in before + ours] == pytest.approx([step.loss for step in one], abs=5e-5)
    last = [steps(seen, name, rank)[-1].sequences for rank in range(ON_RANKS[name][0])]
    assert [row for share in last for row in share] == one[-1].sequences


def test_the_first_rank_alone_writes_and_the_folder_is_as_of_one_rank(seen):
    folders = {name: Run(next((seen.runs / name).iterdir())) for name in ("one", "ddp4", "fsdp2 stopped")}
    one = folders["one"]
    for run in folders.values():
        assert run.id == one.id and run.status() == one.status() and run.finished
        assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
        assert [row["tokens"] for row in run.metrics()] == [row["tokens"] for row in one.metrics()]
        assert sorted(path.name for path in run.path.rglob("*")) == sorted(path.name for path in one.path.rglob("*"))
    assert folders["ddp4"].environment()["ranks"] == 4
    telemetry = [run.telemetry() for run in (one, folders["ddp4"])]
    for ours, theirs in zip(*telemetry, strict=True):
        assert ours.keys() == theirs.keys() and ours.get("layer") == theirs.get("layer")
        if "role" in ours:  # of all ranks together, not of the first one's share
            assert ours["amax"] == pytest.approx(theirs["amax"], rel=1e-3)
            assert ours["tier3"] == pytest.approx(theirs["tier3"], abs=2e-3)


def test_a_reduction_that_does_not_run_is_noticed_on_every_rank(seen):
    for rank in (0, 1):
        line = seen("unreduced", rank)["error"]
        assert "\n" not in line and line.startswith("scales: ")
        assert "differ between 2 ranks, so a reduction did not run" in line and "start again from the last" in line
    assert len(seen("unreduced")["steps"]) == 1


def test_without_synchronization_each_rank_keeps_its_own_scales_through_a_resume(seen):
    for rank in (0, 1):
        assert seen("own resumed", rank)["steps"] == seen("own", rank)["steps"][STOP - 1 :]
    assert steps(seen, "own", 0)[-1].scale != steps(seen, "own", 1)[-1].scale


def test_micro_batches_that_cannot_be_shared_out_are_refused(seen):
    line = (
        "budget.accumulation=3: 2 ranks cannot share so many micro-batches a step evenly; the nearest valid value is 4"
    )
    assert [seen("uneven", rank)["error"].startswith(line) for rank in (0, 1)] == [True, True]


def test_another_number_of_ranks_is_told_of_and_refused_only_where_it_changes_a_run(monkeypatch, config, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.warn_other_world_size(config("experiment=exp8", "protocol=released"), 1)
    assert "warning: scaling.tick=call: its amax histories are those of 1 ranks, not of 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^scaling\.tick=call: .* depend on the number of ranks, 1 until now$"):
        distributed.refuse_other_world_size(config("experiment=exp8", "protocol=released"), 1)
    alike = (("experiment=exp8",), 1), (("experiment=exp8", "protocol=released"), 2)
    for words, before in (*alike, (("experiment=exp8", "protocol=released", "quant=bf16"), 1)):
        distributed.warn_other_world_size(config(*words), before)
        distributed.refuse_other_world_size(config(*words), before)
    assert capsys.readouterr().out == ""


def clock() -> SimpleNamespace:
    """Go on only while the main thread sleeps."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            now[0] += seconds
        else:
            time.sleep(seconds)

    return SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)


@pytest.fixture
def alone(monkeypatch):
    """alone(rank): this process is a rank of two, and the other one is not started."""
    opened = distributed._open_store

    def ready(*where):
        store = opened(*where)
        if distributed.rank() == 0:  # which hosts it
            store.exception(60)
        return store

    def begin(rank: int) -> int:
        port = free_port()
        variables = {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(distributed, "time", clock())
        monkeypatch.setattr(distributed, "_open_store", ready)
        monkeypatch.setattr(distributed, "INIT_TIMEOUT", datetime.timedelta(minutes=1))
        return port

    return begin


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_says_whom_it_waits_for_and_gives_up(alone, rank, capsys):
    port, other = alone(rank), 1 - rank
    with pytest.raises(UserError, match=f"^rank {other} of 2 did not come to 127.0.0.1:{port} within 1 minutes; "):
        distributed.init()
    assert capsys.readouterr().out == (
        f"rank {rank}: waiting for rank {other} of 2 at 127.0.0.1:{port}; Ctrl-C stops waiting\n"
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_rank_that_waits_heeds_signals(alone, rank, number, code, main, monkeypatch, request):
    alone(rank)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    missing = distributed._missing_ranks
    monkeypatch.setattr(distributed, "_missing_ranks", lambda opened: os.kill(os.getpid(), number) or missing(opened))
    found, _, stderr = main("train.py", *TINY, "quant=bf16")
    assert found == code and stderr.endswith(
        "" if rank else "the same command continues\n" if code == 75 else "point\n"
    )


def test_a_port_in_use_is_said_in_one_line(alone, monkeypatch):
    alone(0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"^MASTER_PORT={port}: [^\n]*; choose a free port for all ranks$"):
            distributed.init()


ENVIRONMENTS = [
    ("WORLD_SIZE=2 RANK=0", "error: MASTER_ADDR, MASTER_PORT: not set, and WORLD_SIZE=2 asks for so many processes; "),
    ("WORLD_SIZE=2 RANK=1", "rank 1: error: MASTER_ADDR, MASTER_PORT: not set, and WORLD_SIZE=2 asks for so many "),
    ("WORLD_SIZE=2", "error: RANK, MASTER_ADDR, MASTER_PORT: not set, and WORLD_SIZE=2 asks for so many processes; "),
    ("RANK=1", "error: RANK=1: must be below WORLD_SIZE=1; start all processes with torchrun, or unset RANK"),
    ("WORLD_SIZE=2 RANK=2", "error: RANK=2: must be below WORLD_SIZE=2; "),
    ("RANK=abc", "error: RANK=abc: the environment variable is malformed"),
    ("WORLD_SIZE=auto", "error: WORLD_SIZE=auto: the environment variable is malformed"),
    ("WORLD_SIZE=0", "error: WORLD_SIZE=0: the environment variable is malformed"),
    ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=x", "error: LOCAL_RANK=x: the environment variable is malformed"),
    ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=a MASTER_PORT=x", "rank 1: error: MASTER_PORT=x: must be the number of a free"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=70000", "error: MASTER_PORT=70000: must be the number of a free"),
]


@pytest.mark.parametrize(("variables", "line"), ENVIRONMENTS)
def test_what_makes_a_process_no_rank_is_said_by_itself(variables, line, main, monkeypatch):
    for name, value in (word.split("=") for word in variables.split()):
        monkeypatch.setenv(name, value)
    code, _, stderr = main("train.py", *TINY, "quant=bf16")
    assert code == 2 and stderr.startswith(line) and stderr.count("\n") == 1, stderr


def test_an_empty_variable_is_none(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert (environment.world_size(), environment.rank(), environment.describe_environment()["ranks"]) == (1, 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.get_device().index == 0


def test_a_rank_without_a_gpu_is_told_how_many_there_are(config, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    cfg = config()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^LOCAL_RANK=2: this machine has 2 GPUs; .*--nproc-per-node=2\)$"):
        distributed.check_world_size(cfg)


def test_a_mistake_is_said_by_the_first_rank_alone(main, monkeypatch):
    said = []
    for rank in (0, 1):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        for words in (("budget.accumulation=3",), ("optim.lrr=1",)):
            code, _, stderr = main("train.py", *TINY, *words)
            assert code == 2
            said.append(stderr)
    assert said[0].startswith("error: budget.accumulation=3: 2 ranks cannot share") and said[0].count("\n") == 1
    assert said[1].startswith("error: Could not override 'optim.lrr'") and said[2:] == ["", ""]


def test_nan_agrees_with_nan(monkeypatch):
    ours, theirs = torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 2.0])
    bits = theirs.view(torch.int32).to(torch.int64)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_max", lambda x: torch.maximum(x, torch.stack([bits, -bits])))
    distributed.check_agreement("scales", theirs)
    with pytest.raises(UserError, match=r"^scales: 1 of 2 differ between 2 ranks"):
        distributed.check_agreement("scales", ours)


def test_one_rank_agrees_with_itself():
    assert distributed.broadcast_object(3) == 3 and distributed.all_gather_object(3) == [3]
    assert distributed.any_rank(True) and not distributed.any_rank(False)


@pytest.mark.slow
def test_ranks_that_torchrun_restarts_find_each_other(tmp_path):
    lines = [
        "import os, torch",
        "from qat.utils import distributed as d",
        "d.init()",
        "d.all_reduce_sum(torch.ones(1))",
    ]
    lines += ["if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':", "    os._exit(3)"]
    (tmp_path / "script.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, tmp_path / "script.py"], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.slow
def test_torchrun_trains_a_run_and_its_baseline(texts, tmp_path):
    words = [
        *TINY,
        "experiment=exp8",
        "budget.steps=4",
        "data.source=files",
        f"data.path={texts}",
        f"{RUNS}={tmp_path}",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(ROOT / "scripts" / "train.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [Run(path) for path in tmp_path.iterdir()]
    assert len(runs) == 2 and all(run.finished and run.environment()["ranks"] == 2 for run in runs)
    for run in runs:  # the first rank alone speaks
        assert done.stdout.splitlines().count(run.id) == 1
