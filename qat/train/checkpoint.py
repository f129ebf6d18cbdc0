"""Checkpoints: safetensors and JSON, written to a temporary folder and renamed, so that no reader sees half of one.

A checkpoint holds everything that the rest of the run depends on: parameters (the FP32 master weights), Adam moments,
the scale bank, the RNG state, the data cursor and the step. The last one of a run holds only parameters and scales.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.train.optimizer import empty_state
from qat.utils import distributed, files

VERSION = 2


class Damaged(UserError):
    """A checkpoint that is incomplete or has changed since it was written."""


class Writer:
    """Save checkpoints in the background, one at a time. An error is raised by the next call of any method."""

    def __init__(self, folder: Path):
        self.folder, self._pending = folder, None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], facts: dict) -> None:
        """Copy `tensors`, wait for the checkpoint before, and start to save the copy.

        `tensors` is emptied on the way: tensors gathered from many ranks would otherwise take memory twice.
        """
        self.wait()
        copies = {
            name: {key: group.pop(key).detach().to("cpu", copy=True) for key in list(group)}
            for name, group in tensors.items()
        }
        self._pending = self._thread.submit(save, self.folder, step, copies, facts)

    def check(self) -> None:
        """Raise the error of a save that has failed by now, without waiting."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error) -> None:
        self._thread.shutdown()  # wait: the folder may be read next
        self.wait()


def save(folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], facts: dict, keep: int = 2) -> Path:
    """Write `folder/step-<step>/`: a safetensors file for each entry of `tensors`, and `facts` as JSON with checksums.

    Then remove all but the newest `keep` checkpoints; the second newest is for the case that the newest is damaged. On
    a disk too full for one more it is removed before.
    Errors: OSError that names the file; earlier checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".writing-*"):  # left by a killed process
        files.remove(unfinished)
    target = folder / f"step-{step:08d}"
    if shutil.disk_usage(folder).free < 1.01 * sum(t.nbytes for group in tensors.values() for t in group.values()):
        for old in sorted(path for path in folder.glob("step-*") if path.name < target.name)[:-1]:
            files.remove(old)
    with files.new_folder(target) as temporary:
        _write(temporary, {"version": VERSION, "step": step, **facts}, tensors)
        for path in folder.glob("step-*"):
            if path.name > target.name:  # damaged: otherwise the run would have continued from it
                files.remove(path)
    keep_newest(folder, keep)
    return target


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints, and what could not be removed before."""
    for leftover in folder.glob(f"{files.REMOVING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-count]:
        files.remove(old)


def _write(folder: Path, facts: dict, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    facts["checksums"] = {}
    for name, group in sorted(tensors.items()):
        path, group = folder / f"{name}.safetensors", {key: t.detach().cpu().contiguous() for key, t in group.items()}
        with files.naming(path):
            save_file(group, path)
            facts["checksums"][path.name] = _checksum_of_saved(path, group)
    with files.naming(folder / "facts.json"):
        (folder / "facts.json").write_text(json.dumps(facts | {"checksum": _digest(facts)}))


def latest(folder: Path, run: str | None = None) -> tuple[dict[str, dict[str, torch.Tensor]], dict] | None:
    """Return the newest undamaged checkpoint in `folder` as (tensors, facts), or None when there is none yet.

    For a damaged one, print a warning and take the one before. Errors: UserError when all are damaged, or when one
    belongs to another run than `run` or to a later version of the format.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; delete the run folder to train it again")
    candidates = sorted(folder.glob("step-*"), reverse=True)
    for candidate in candidates:
        try:
            tensors, facts = load(candidate)
        except Damaged as error:
            print(f"warning: {error}", flush=True)
            continue
        if run is not None and facts["run"] != run:
            raise UserError(f"{candidate} is of the run {facts['run']}; put it back there, or delete it")
        return tensors, facts
    if candidates:
        raise UserError(f"{folder}: no checkpoint can be read; delete the run folder to train it again")
    return None


def load(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """Read one checkpoint. Errors: Damaged; UserError for a later version of the format."""
    try:
        facts = _facts(path)
        for name, checksum in facts["checksums"].items():
            if _checksum(path / name) != checksum:
                raise Damaged(f"{path}/{name} is damaged: its checksum differs")
        return {name.removesuffix(".safetensors"): load_file(path / name) for name in facts["checksums"]}, facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error


def _facts(path: Path) -> dict:
    facts = json.loads((path / "facts.json").read_text())
    checksum, version = facts.pop("checksum"), facts["version"]
    if version > VERSION:
        raise UserError(
            f"{path} is of version {version} of the format, and this code reads up to {VERSION}: update the code, or "
            f"delete the run folder to train it again"
        )
    if checksum != _digest(facts):
        raise Damaged(f"{path}/facts.json is damaged: its checksum differs")
    return facts


@contextlib.contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Let a `UserError` within this context name the checkpoints in `folder`."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{folder}: {error}; resume with the configuration it was made with, or delete the run folder"
        ) from error


def matched(
    tensors: dict[str, dict[str, torch.Tensor]], group: str, wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `tensors[group]`. Errors: UserError unless it has the names, shapes and types of `wanted`."""
    saved = tensors.get(group, {})
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved:
            raise UserError(f"{group}.safetensors lacks {name}")
        if name not in wanted:
            raise UserError(f"{group}.safetensors has {name}, which this run does not have")
        expected, actual = _describe(wanted[name]), _describe(saved[name])
        if expected != actual:
            raise UserError(f"{group}.safetensors has {name} as {actual}, this run has it as {expected}")
    return saved


def _describe(tensor: torch.Tensor) -> str:
    """Return dtype and shape, as in "float32[2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def optimizer_tensors(optimizer: torch.optim.AdamW, names: dict[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as {`<parameter>/<state>`: tensor}, gathered on the first rank.

    Parameters without a gradient until now have zeros.
    """
    return {
        f"{name}/{key}": distributed.full_tensor_on_main(tensor)
        for p, name in names.items()
        for key, tensor in (optimizer.state[p] or empty_state(optimizer, p)).items()
    }


def load_optimizer(
    optimizer: torch.optim.AdamW, names: dict[torch.Tensor, str], tensors: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Restore the tensors of `optimizer_tensors`, the group `optimizer`. Errors: UserError if of another model."""
    for p in names:
        optimizer.state[p] = empty_state(optimizer, p)
    states = {f"{name}/{key}": (tensor, p) for p, name in names.items() for key, tensor in optimizer.state[p].items()}
    saved = matched(tensors, "optimizer", {name: tensor for name, (tensor, _) in states.items()})
    for name, (tensor, p) in states.items():
        # Copied, because loaded tensors are mapped to their file, and NFS and FUSE cannot remove a mapped file.
        tensor.copy_(distributed.shard_like(saved[name], p))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _checksum_of_saved(path: Path, group: dict[str, torch.Tensor]) -> str:
    """Return `_checksum(path)` for tensors saved there: read is only the header, which says in which order they are."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items()}
    digest = hashlib.blake2b(length + header)
    for name in sorted(places, key=places.get):
        digest.update(group[name].view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(facts: dict) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode()).hexdigest()
