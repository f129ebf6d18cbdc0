"""Time works in turn, so that noise of the machine affects all alike; measure peak memory in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from qat.utils import device


def wait() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of one call, on average over `repeats` in a row."""
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


def in_turn(
    works: dict[str, Callable[[], object]], rounds: int, repeats: int = 1, warmup: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of each of `works` in every round. Before, there are `warmup` rounds that are not measured."""
    for _ in range(warmup):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, repeats))
    return times


def ratio(times: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """Return (median, smallest, largest) over the rounds of the seconds of `name` over those of `to`."""
    ratios = [a / b for a, b in zip(times[name], times[to], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_memory(work: Callable[..., object], *arguments) -> float:
    """Return the peak memory in bytes of `work(*arguments)` in a process of its own: of the GPU, else resident.

    Errors: RuntimeError when the process dies, probably for want of memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, work, arguments).result()


def _peak(work: Callable[..., object], arguments: Sequence) -> float:
    device.prepare()
    work(*arguments)
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else _largest_resident()


def _largest_resident() -> float:
    """Return the peak in bytes. On Linux not by getrusage, which also counts the process that this one started from."""
    status = Path("/proc/self/status")
    if status.exists():
        facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024.0 * int(facts["VmHWM"].split()[0])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS: bytes
