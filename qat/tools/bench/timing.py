"""Seconds of things run in turn, so that a noisy machine is as noisy for each; and peak memory, alone in a process."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qat.utils import device


def wait() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of one call, on average over `repeats` in a row."""
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - started) / repeats


def in_turn(
    works: dict[str, Callable[[], object]], rounds: int, repeats: int = 1, warmup: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of each of `works` in every round, all of them run once a round after `warmup` rounds
    unmeasured."""
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
    """Return the largest memory in bytes that `work(*arguments)` needs in a process of its own: of the GPU where there
    is one, else resident. Errors: RuntimeError when the process dies."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise RuntimeError("a process died while its memory was measured, probably for want of memory") from error
    finally:
        process.join()


def _child(pipe, work, arguments) -> None:
    device.prepare()
    work(*arguments)
    if torch.cuda.is_available():
        pipe.send(float(torch.cuda.max_memory_allocated()))
    else:
        pipe.send(_largest_resident())


def _largest_resident() -> float:
    """Bytes. Linux's getrusage would also count what the process was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024.0 * int(facts["VmHWM"].split()[0])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS: bytes
