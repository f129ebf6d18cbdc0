"""Checkpoints: safetensors and JSON only, written to a temporary folder and renamed, so that a reader never sees half.

A checkpoint holds parameters (the FP32 master weights), Adam moments, the scale bank, the RNG state, the data cursor
and the step: everything that the rest of the run depends on. The last one of a run holds parameters and scales.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qat import ranks
from qat.config import UserError


def save(folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], facts: dict, keep: int = 2) -> Path:
    """Write `folder/step-<step>/`: a safetensors file for each entry of `tensors`, and `facts` as JSON with checksums.

    Then all but the newest `keep` checkpoints go: the one before the newest stays in case the newest is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, group in tensors.items():
        save_file({key: t.detach().cpu().contiguous() for key, t in group.items()}, temporary / f"{name}.safetensors")
    checksums = {f.name: _checksum(f) for f in sorted(temporary.iterdir())}
    (temporary / "facts.json").write_text(json.dumps({"step": step, "checksums": checksums, **facts}))
    for file in temporary.iterdir():
        flush(file)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    flush(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict] | None:
    """The newest undamaged checkpoint in `folder` as (tensors, facts), or None when there is none yet.

    Damaged ones are named and skipped. Errors: UserError when all are damaged, rather than a silent start from zero.
    """
    candidates = sorted(folder.glob("step-*"), reverse=True)
    for candidate in candidates:
        try:
            return load(candidate)
        except UserError as error:
            print(f"warning: {error}", flush=True)
    if candidates:
        raise UserError(f"{folder}: no checkpoint can be read; delete the run folder to train it again")
    return None


def load(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """Read one checkpoint. Errors: UserError when it is incomplete or its checksums do not agree."""
    try:
        facts = json.loads((path / "facts.json").read_text())
        for name, checksum in facts["checksums"].items():
            if _checksum(path / name) != checksum:
                raise UserError(f"{path}/{name} is damaged: its checksum differs")
        return {name.removesuffix(".safetensors"): load_file(path / name) for name in facts["checksums"]}, facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors, `<parameter>/<state>`."""
    state = {f"{names[p]}/{key}": value for p, values in optimizer.state.items() for key, value in values.items()}
    return {name: ranks.whole(value) for name, value in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], saved: dict[str, torch.Tensor]):
    """Put back what `optimizer_tensors` gave."""
    for parameter, name in names.items():
        state = {key.rpartition("/")[2]: t for key, t in saved.items() if key.rpartition("/")[0] == name}
        optimizer.state[parameter] = {key: ranks.shard_like(t, parameter) for key, t in state.items()}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def flush(path: Path) -> None:
    """Hand a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
