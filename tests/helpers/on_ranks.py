"""Runs on one, two and four ranks, each a process of its own on the CPU: `python -m tests.helpers.on_ranks <texts>
<folder>`.

One interpreter imports everything and forks the ranks of every run, which spares them ten seconds each. What the ranks
saw is left in the folder as `<run>.<rank>.json`; the runs themselves in `<folder>/runs`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, TINY, typed  # first: it sets the number of threads that torch and Numba read

# isort: split
import functools

import torch

from qat.errors import UserError
from qat.quant.scaling import ScaleBank
from qat.train import loop
from qat.train.step import Trainer
from qat.utils import distributed

WORDS = (*TINY, "experiment=exp8", "budget.steps=6", "budget.accumulation=4", "budget.checkpoint_every=2")
WORDS += ("budget.seq_len=16", "warmup.bf16=0", "budget.telemetry_every=2", "quant.bf16_blocks=2")
WORDS += ("model.blocks=4", "model.architecture.num_hidden_layers=4")
STOP = 3  # the step before which an interrupted run stops

# name -> (ranks, words, what else). stop: before step STOP; after: continues what that run left; bare: without the
# reduction of amaxes.
RUNS = {
    "one": (1, (), {}),
    "ddp2": (2, ("budget.activation_checkpointing=true",), {}),
    "ddp4": (4, (), {}),
    "fsdp2": (2, ("budget.parallel=fsdp", "budget.activation_checkpointing=true"), {}),
    "fsdp2 compiled": (2, ("budget.parallel=fsdp", "budget.compile=true"), {"stop": True}),
    "unrounded1": (1, ("quant.weights=false", "budget.steps=2"), {}),
    "unrounded2": (2, ("quant.weights=false", "budget.steps=2", "budget.parallel=fsdp"), {}),
    "compiled": (2, ("budget.compile=true",), {"stop": True}),
    "fsdp2 stopped": (2, ("budget.parallel=fsdp",), {"stop": True}),
    "then 4": (4, (), {"after": "fsdp2 stopped"}),
    "ddp4 stopped": (4, (), {"stop": True}),
    "then 1": (1, (), {"after": "ddp4 stopped"}),
    "unreduced": (2, (), {"bare": True}),
    "own": (2, ("scaling.sync=none", "scaling.tick=call"), {}),
    "own stopped": (2, ("scaling.sync=none", "scaling.tick=call"), {"stop": True}),
    "own resumed": (2, ("scaling.sync=none", "scaling.tick=call"), {"after": "own stopped"}),
    "uneven": (2, ("budget.accumulation=3",), {}),
}


class Stopped(Exception):
    pass


def unreduced(bank: ScaleBank) -> torch.Tensor:
    """Do as `ScaleBank._take_amaxes`, of this rank alone."""
    amax = torch.cat(bank.amaxes)
    torch._foreach_zero_(bank.amaxes)
    return amax


def work(rank: int, size: int, name: str, texts: str, folder: str) -> None:
    """One rank of a run, in a process of its own."""
    _, words, how = RUNS[name]
    runs = Path(folder) / "runs" / how.get("after", name)
    cfg = typed(runs, *WORDS, *words, **{"data.source": "files", "data.path": texts})
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

    Trainer.step = observed
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # needs no C++ compiler
    if how.get("bare"):
        ScaleBank._take_amaxes = unreduced
    try:
        distributed.check_world_size(cfg)
        loop.train(cfg)
    except Stopped:
        pass
    except UserError as error:
        seen["error"] = str(error)
    (Path(folder) / f"{name}.{rank}.json").write_text(json.dumps(seen))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(work: Callable, size: int, *rest) -> None:
    """Run work(rank, size, *rest) on so many ranks, each a copy of this process, and wait for them."""
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.multiprocessing.start_processes(_rank, (work, size, *rest), nprocs=size, start_method="fork")


def _rank(rank: int, work: Callable, *rest) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    work(rank, *rest)


def run_module(module: str, *arguments: Path) -> None:
    """`python -m tests.<module> <arguments>`, which must not fail."""
    command = [sys.executable, "-m", f"tests.helpers.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def main(texts: str, folder: str) -> None:
    for name, (size, _, _) in RUNS.items():
        fork(work, size, name, texts, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
