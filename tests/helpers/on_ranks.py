"""Runs on one, two and four ranks, processes on the CPU: `python -m tests.helpers.on_ranks <texts> <folder> [<run>]`.

One interpreter trains alone first, which imports and compiles everything, and forks the ranks, which then need not.
What the ranks saw is left in the folder as `<run>.<rank>.json`; the runs themselves in `<folder>/runs`.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, TINY, typed  # first: it sets the number of threads that torch and Numba read

os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # OpenMP's does not outlive a fork

# isort: split
import pytest
import torch

from qat.errors import UserError
from qat.quant.scaling import ScaleBank
from qat.train import loop
from qat.train.step import Trainer
from qat.utils import distributed

WORDS = (*TINY, "experiment=exp8", "budget.steps=6", "budget.accumulation=4", "budget.checkpoint_every=2")
WORDS += ("budget.seq_len=16", "warmup.bf16=0", "budget.telemetry_every=2", "quant.bf16_blocks=1")
WORDS += ("model.blocks=2", "model.architecture.num_hidden_layers=2")
OTHER = ("scaling=lsq", "estimator=cage", "quant.cage_silent=0.3", "loss=distill", "budget.steps=4")
OTHER += ("optim.moments=bf16", "optim.lr=1e-2", "+model.architecture.initializer_range=0.2")
SHADOW = "scaling.shadow=[most_recent,max:4]"
STOP = 3  # the step before which an interrupted run stops

# name -> (ranks, words, what else). stop: before step STOP; after: continues what that run left; bare: without the
# reduction of amaxes; slow: only when it is named. Neighbours with as many ranks share their processes.
RUNS = {
    "one": (1, (SHADOW,), {}),
    "unrounded1": (1, ("quant.weights=false", "budget.steps=2"), {}),
    "other1": (1, OTHER, {}),
    "ddp2": (2, ("budget.activation_checkpointing=true",), {}),
    "ddp2 shadow": (2, ("budget.activation_checkpointing=true", SHADOW), {}),
    "fsdp2": (2, ("budget.parallel=fsdp", "budget.activation_checkpointing=true"), {}),
    "unrounded2": (2, ("quant.weights=false", "budget.steps=2", "budget.parallel=fsdp"), {}),
    "other ddp2": (2, OTHER, {}),
    "other fsdp2": (2, (*OTHER, "budget.parallel=fsdp"), {}),
    "compiled": (2, ("budget.compile=true",), {"stop": True, "slow": True}),
    "fsdp2 compiled": (2, ("budget.parallel=fsdp", "budget.compile=true"), {"stop": True}),
    "fsdp2 stopped": (2, ("budget.parallel=fsdp",), {"stop": True}),
    "unreduced": (2, (), {"bare": True}),
    "own": (2, ("scaling.sync=none", "scaling.tick=call"), {}),
    "own stopped": (2, ("scaling.sync=none", "scaling.tick=call"), {"stop": True}),
    "own resumed": (2, ("scaling.sync=none", "scaling.tick=call"), {"after": "own stopped"}),
    "uneven": (2, ("budget.accumulation=3",), {}),
    "ddp4": (4, (SHADOW,), {}),
    "then 4": (4, (), {"after": "fsdp2 stopped"}),
    "ddp4 stopped": (4, (), {"stop": True}),
    "then 1": (1, (), {"after": "ddp4 stopped"}),
}


class Stopped(Exception):
    pass


def unreduced(bank: ScaleBank) -> torch.Tensor:
    """Do as `ScaleBank._take_amaxes`, of this rank alone."""
    amax = torch.cat(bank.amaxes)
    torch._foreach_zero_(bank.amaxes)
    return amax


def train(name: str, texts: Path, folder: Path, patch: pytest.MonkeyPatch) -> dict:
    """Return what this rank sees of a run."""
    _, words, how = RUNS[name]
    runs = folder / "runs" / how.get("after", name)
    cfg = typed(runs, *WORDS, *words, **{"data.source": "files", "data.path": str(texts)})
    seen = {"steps": [], "error": None}
    step = Trainer.step

    def observed(trainer, number, batches, **more):
        if how.get("stop") and number == STOP:
            raise Stopped
        result = step(trainer, number, batches, **more)
        bank = trainer.bank
        seen["steps"].append(
            {
                "step": number,
                "sequences": torch.cat(batches).tolist(),
                "loss": float(result.loss),
                "grad_norm": float(result.grad_norm),
                "newest": bank.history[(bank.written - 1) % len(bank.history)][0].tolist(),
                "scale": bank.scale.tolist(),
                "filled": min(int(bank.written), len(bank.history)),
            }
        )
        return result

    patch.setattr(Trainer, "step", observed)
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    if how.get("bare"):
        patch.setattr(ScaleBank, "_take_amaxes", unreduced)
    try:
        distributed.check_world_size(cfg)
        loop.train(cfg)
    except Stopped:
        pass
    except UserError as error:
        seen["error"] = str(error)
    return seen


def train_all(rank: int, names: list[str], texts: Path, folder: Path) -> None:
    """One rank of these runs, one after the other."""
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            seen = train(name, texts, folder, patch)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(size: int, work: Callable, *rest) -> None:
    """Run work(rank, *rest) on so many ranks and wait for them: one is this process, more are copies of it."""
    if size == 1:
        return work(0, *rest)
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.multiprocessing.start_processes(_rank, (work, *rest), nprocs=size, start_method="fork")
    del os.environ["WORLD_SIZE"]


def _rank(rank: int, work: Callable, *rest) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    work(rank, *rest)


def run_module(module: str, *arguments: Path | str) -> None:
    """`python -m tests.<module> <arguments>`, which must not fail."""
    command = [sys.executable, "-m", f"tests.helpers.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    texts, folder = map(Path, sys.argv[1:3])
    chosen = sys.argv[3:] or [name for name, (*_, how) in RUNS.items() if not how.get("slow")]
    for size, names in itertools.groupby(chosen, lambda name: RUNS[name][0]):
        fork(size, train_all, list(names), texts, folder)
