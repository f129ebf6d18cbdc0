"""Describe this machine: what it has of what a run needs."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from huggingface_hub import constants

from qat.cli import preflight
from qat.config import Config
from qat.tools.flops import product_flops
from qat.utils import files
from qat.utils.environment import cache_dir, describe_environment, hardware_name

_HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Machine:
    """A machine; memory and disk in bytes.

    flops: FLOP/s of a product of large matrices in the arithmetic of runs. hub: whether it answers; None: not asked.
    """

    processor: str
    cores: int
    memory: int  # free
    gpu: str | None
    gpus: int
    gpu_memory: int
    flops: float
    runs_free: int
    cache_free: int
    one_disk: bool  # runs and cache share it
    problems: list[str]  # of `qat.cli.preflight`
    hub: bool | None

    @property
    def name(self) -> str:
        """The hardware, as records of benchmarks name it."""
        return hardware_name(vars(self))


def here(cfg: Config) -> Machine:
    """Describe this machine. Where `cfg` needs a hub, that is asked, and waited for three seconds at most."""
    machine, cuda = describe_environment(), torch.cuda.is_available()
    runs, cache = files.existing(Path(cfg.runs_dir)), cache_dir()
    return Machine(
        processor=machine["processor"],
        cores=machine["cores"],
        memory=_memory(),
        gpu=machine["gpu"],
        gpus=torch.cuda.device_count() if cuda else 0,
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if cuda else 0,
        flops=product_flops(4096 if cuda else 1024, cfg.budget.arithmetic),
        runs_free=shutil.disk_usage(runs).free,
        cache_free=shutil.disk_usage(cache).free,
        one_disk=runs.stat().st_dev == cache.stat().st_dev,
        problems=preflight.problems(cfg, planning=True),
        hub=_hub_answers() if needs_hub(cfg) else None,
    )


def needs_hub(cfg: Config) -> bool:
    """Return whether the model or a text comes from a hub."""
    return any(preflight.from_hub(source) for source in (cfg.model, cfg.data, cfg.validation) if source)


def _memory() -> int:
    """Return the bytes of memory available; on Linux with those that the system uses for caches."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _hub_answers() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return httpx.head(constants.ENDPOINT, timeout=_HUB_SECONDS, follow_redirects=True).status_code < 500
    except (httpx.HTTPError, OSError):
        return False
