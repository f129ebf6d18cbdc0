"""Count what ranks send each other in a step.

Counts and sizes are those of real steps on 1, 2 and 4 ranks (tests/tools/test_communication.py). Telemetry, held-out
texts and checkpoints come on top, at the steps that have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qat.config import Config
from qat.quant.rules import RULES
from qat.tools.flops import Shape

_BUCKET = 25 * 2**20  # bytes, after which DDP begins another all-reduce


@dataclass(frozen=True)
class Traffic:
    """Sum up the calls of one collective operation in a step. size: bytes of whole tensors, of all calls together."""

    operation: str  # all_reduce, all_gather, reduce_scatter, broadcast
    calls: int
    size: float

    def sent(self, ranks: int) -> float:
        """Return the bytes that the busiest rank sends when ranks form a ring."""
        factor = {"all_reduce": 2, "broadcast": ranks / (ranks - 1)}.get(self.operation, 1)
        return factor * (ranks - 1) / ranks * self.size


def of_step(shape: Shape, cfg: Config, ranks: int, calls: int) -> list[Traffic]:
    """Return what is sent in a step of `calls` micro-batches a rank."""
    if ranks == 1:
        return []
    models = 2 if cfg.loss.distill else 1
    small = [Traffic("all_reduce", 2, 4 * (models + 1))]  # the losses, and whether a rank was told to stop
    if shape.scales and cfg.scaling.sync == "max":
        ticks = 1 if cfg.scaling.tick == "step" else calls
        kinds = 2 if RULES[cfg.scaling.algo].learns else 1  # amaxes, slopes
        small.append(Traffic("all_reduce", kinds * ticks, 4 * kinds * ticks * shape.scales))
    weight = cfg.optim.weight_bytes
    gradients = weight * shape.parameters
    if cfg.budget.parallel == "ddp":
        buckets = math.ceil(gradients / _BUCKET)
        return [Traffic("all_reduce", buckets, gradients), *small, Traffic("broadcast", 1, 4 * models * shape.buffers)]
    # A block is gathered twice, for the forward and the backward pass. Parameters outside of blocks are gathered once,
    # those of a teacher together with the model's. A teacher's blocks are gathered once, and the last once more, which
    # FSDP prefetches for a backward pass that a teacher has not.
    again = shape.blocks + (models - 1)
    size = models * gradients + weight * again * shape.block
    return [
        Traffic("all_gather", calls * (models * shape.blocks + again + 1), calls * size),
        Traffic("reduce_scatter", shape.blocks + 1, gradients),
        *small,
        Traffic("all_reduce", 1, 4 * shape.tensors),  # norms of the gradients
    ]
