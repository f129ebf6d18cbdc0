"""What ranks really send in a step: `python -m tests.helpers.traffic <texts> <folder>`. PyTorch's profiler looks on
while gloo's ranks, forked from one interpreter, train in either way; `<parallel>.<ranks>.json` in the folder has the
calls of one step of the first rank and the elements of each, as [operation, elements].
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from tests.conftest import TINY, typed  # first: it sets the number of threads that torch and Numba read

# isort: split
import pytest
from torch.profiler import profile

from qat.train import loop
from tests.helpers.on_ranks import fork

WORDS = (*TINY, "experiment=exp8", "data.source=files", "validation=none", "warmup.bf16=0", "quant.bf16_blocks=1")
WORDS += ("model.blocks=2", "model.architecture.num_hidden_layers=2", "budget.seq_len=16", "budget.accumulation=4")
WORDS += ("budget.steps=4", "budget.checkpoint_every=100", "budget.telemetry_every=100", "budget.validation_tokens=32")
STEP = 3  # neither with telemetry, nor a checkpoint
RANKS, PARALLEL = (1, 2, 4), ("ddp", "fsdp")

# The operations by the profiler's names, and which of a call's shapes is that of the whole tensor.
_SHAPED = {"c10d::_allgather_base_": ("all_gather", 0), "c10d::_reduce_scatter_base_": ("reduce_scatter", 1)}
_GLOO = {"gloo:all_reduce": "all_reduce", "gloo:broadcast": "broadcast"}


def calls(events) -> list[tuple[str, int]]:
    """(operation, elements of the whole tensor) of every collective. Gloo reduces and scatters by an all-reduce, which
    is not counted twice."""
    found = [(_SHAPED[e.name][0], math.prod(e.input_shapes[_SHAPED[e.name][1]])) for e in events if e.name in _SHAPED]
    reduced = [elements for operation, elements in found if operation == "reduce_scatter"]
    for event in events:
        if event.name in _GLOO:
            elements = sum(map(math.prod, event.input_shapes))
            if _GLOO[event.name] == "all_reduce" and elements in reduced:
                reduced.remove(elements)
            else:
                found.append((_GLOO[event.name], elements))
        elif event.name.startswith("c10d::") and event.name not in _SHAPED and event.name not in _KNOWN:
            found.append((event.name, 0))  # one that nobody has thought of
    return found


_KNOWN = ("c10d::allreduce_", "c10d::broadcast_")


def work(rank: int, size: int, texts: str, folder: str) -> None:
    steps = loop._Session.steps
    for parallel in PARALLEL:
        cfg = typed(Path(folder) / f"{parallel}{size}", *WORDS, **{"budget.parallel": parallel, "data.path": texts})
        profiler = profile(record_shapes=True)

        def observed(session, log, profiler=profiler):
            for number in steps(session, log):
                if rank == 0 and number == STEP:
                    profiler.stop()
                yield number
                if rank == 0 and number == STEP - 1:
                    profiler.start()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Session, "steps", observed)
            loop.train(cfg)
        if rank == 0:
            (Path(folder) / f"{parallel}.{size}.json").write_text(json.dumps(calls(profiler.events())))


def main(texts: str, folder: str) -> None:
    for size in RANKS:
        fork(size, work, size, texts, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
