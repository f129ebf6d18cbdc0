"""Ranks, the cache folder, files inside PyPI packages, and a description of the machine."""

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

from qat.errors import ConfigError, UserError
from qat.utils import files

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "hydra-core", "omegaconf", "wandb", "numba", "numpy")
_SLURM = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_PARTITION", "JOB_NODELIST", "RESTART_COUNT")
_DRIVER = Path("/sys/module/nvidia/version")  # works in containers, and never hangs as nvidia-smi may


def world_size() -> int:
    """Return how many ranks there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this rank, from 0."""
    return int(os.environ.get("RANK") or 0)


def is_main_process() -> bool:
    """Return whether this is the first rank, which alone writes and logs."""
    return rank() == 0


def refuse_ranks(work: str) -> None:
    """Raise `ConfigError` where this is one of several ranks."""
    if world_size() > 1:
        raise ConfigError(f"{work} is one process's work: start it without torchrun")


def package_path(path: str) -> Path:
    """Return where `package/inner/file` is on disk, without importing the package. Errors: UserError when not there."""
    package, _, inner = path.partition("/")
    if not package.isidentifier():
        raise UserError(f"{path}: not a place in a package; for a folder of your own set data.source=files")
    spec = importlib.util.find_spec(package)
    full = Path(spec.submodule_search_locations[0]) / inner if spec and spec.submodule_search_locations else None
    if full is None or not full.exists():
        raise UserError(f"{path} is not installed: run `make setup`")
    return full


def source_path(source: str, path: str) -> Path:
    """Return the file or folder of a model or text: with source=package in a package, else the user's own."""
    return package_path(path) if source == "package" else Path(files.expand(path))


def cache_dir() -> Path:
    """Return the cache folder, made when missing: $HIF8_CACHE, else a folder in the user's cache.

    It has models/ (converted models), numba/ (compiled kernels), tokens/, text/ (prepared texts) and parsed benchmarks.
    """
    own, user = os.environ.get("HIF8_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores a relative XDG_CACHE_HOME.
    path = Path(own) if own.strip() else Path(user if os.path.isabs(user) else "~/.cache") / "hif8-qat"
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(f"{path}: cannot be a cache ({reason}); set HIF8_CACHE to another folder") from error
    return path


def describe_environment() -> dict:
    """Return what a result depends on besides the configuration: hardware, versions, code and command.

    It holds no environment variables and no host name, which could identify the user; only SLURM's names its nodes.
    """
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
        "ranks": world_size(),
        "slurm": {name.lower(): os.environ[f"SLURM_{name}"] for name in _SLURM if f"SLURM_{name}" in os.environ},
        "git": _git(),
        "packages": {name: installed[name] for name in _PACKAGES if name in installed},
        "build": torch.__config__.show().split("\n"),
        "installed": installed,
    }


def brief(environment: Mapping) -> dict:
    """Return a description of an environment without its long lists."""
    return {name: value for name, value in environment.items() if name not in ("installed", "build")}


def hardware_name(environment: Mapping) -> str:
    """Return the GPU of an environment, else its processor."""
    return environment.get("gpu") or f"{environment.get('processor')}, {environment.get('cores')} cores"


def machine_summary() -> str:
    """Return hardware and PyTorch version of this process in one line."""
    now = describe_environment()
    return f"{hardware_name(now)}, torch {now['packages']['torch']}"


def commit_name(git: Mapping | None) -> str:
    """Return the commit of an environment's entry `git`, and whether files differed from it."""
    return f"{git['commit'][:12]}{', modified' if git['modified'] else ''}" if git else "unknown"


@functools.cache
def _installed() -> dict[str, str]:
    """Return {name: version} of every installed package, by name."""
    packages = (distribution.metadata for distribution in importlib.metadata.distributions())
    return dict(sorted((package["Name"], package["Version"]) for package in packages if package["Name"]))


def _gpus() -> dict:
    """Describe the visible NVIDIA GPUs by the first of them, memory in bytes; all None without any."""
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


def _git() -> dict | None:
    """Return the commit, whether files differ from it, and a hash of the difference; None outside of a repository."""

    def run(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=10).stdout.decode().strip()

    try:
        diff = hashlib.sha256(run("diff", "--binary", "--no-ext-diff", "HEAD").encode()).hexdigest()[:16]
        modified = bool(run("status", "--porcelain"))
        return {"commit": run("rev-parse", "HEAD"), "modified": modified, "diff": diff if modified else None}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
