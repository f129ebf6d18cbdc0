"""What ranks send each other in a step, and how well training scales by it when every GPU keeps its share of the work.

The counts and sizes are those of real steps on 1, 2 and 4 ranks (tests/utils/test_communication.py); the times are
reckoned
from assumed links. Telemetry, held-out texts and checkpoints come on top, at the steps that have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qat.config import Config
from qat.tools.flops import Shape

# ASSUMED: H100s or H200s with NVLink, and one InfiniBand adapter of 400 Gb/s a node. Bytes a second, one way.
NODE = 8  # GPUs
WITHIN, BETWEEN = 450e9, 50e9  # of a GPU, of a node
LATENCY = 20e-6  # seconds of a call, times log2 of the ranks
_BUCKET = 25 * 2**20  # bytes, after which DDP begins another all-reduce


@dataclass(frozen=True)
class Traffic:
    """All calls of one collective operation in a step. size: bytes of whole tensors, of all calls together."""

    operation: str  # all_reduce, all_gather, reduce_scatter, broadcast
    calls: int
    size: float

    def sent(self, ranks: int) -> float:
        """Return the bytes that the busiest rank sends, by rings."""
        times = {"all_reduce": 2, "broadcast": ranks / (ranks - 1)}.get(self.operation, 1)
        return times * (ranks - 1) / ranks * self.size


def of_step(shape: Shape, cfg: Config, ranks: int, calls: int) -> list[Traffic]:
    """Return what is sent in a step of `calls` micro-batches a rank."""
    if ranks == 1:
        return []
    # The loss, and whether anyone was told to stop; the amaxes. Every rank reads its own text.
    small = [Traffic("all_reduce", 2, 8)]
    if shape.scales and cfg.scaling.sync == "max":
        ticks = 1 if cfg.scaling.tick == "step" else calls
        small.append(Traffic("all_reduce", ticks, 4 * ticks * shape.scales))
    gradients = 4 * shape.parameters
    if cfg.budget.parallel == "ddp":
        buckets = math.ceil(gradients / _BUCKET)
        return [Traffic("all_reduce", buckets, gradients), *small, Traffic("broadcast", 1, 4 * shape.buffers)]
    # What is in no block stays whole from the forward to the backward pass; a block is gathered for either.
    blocks = 4 * shape.blocks * shape.block
    return [
        Traffic("all_gather", calls * (2 * shape.blocks + 1), calls * (gradients + blocks)),
        Traffic("reduce_scatter", shape.blocks + 1, gradients),
        *small,
        Traffic("all_reduce", 1, 4 * shape.tensors),  # norms of the gradients
    ]


def seconds(traffic: list[Traffic], ranks: int) -> float:
    """Return the seconds of a step, call after call: rings through all GPUs go as fast as their slowest link."""
    speed = WITHIN if ranks <= NODE else BETWEEN
    return sum(each.sent(ranks) / speed + each.calls * LATENCY * math.log2(ranks) for each in traffic)


def efficiency(computing: float, traffic: list[Traffic], ranks: int) -> float:
    """Return the share of a GPU's time that computes, of `computing` seconds a step, if nothing was sent meanwhile:
    more is sent meanwhile than not, so it is what can be counted on."""
    return computing / (computing + seconds(traffic, ranks))
