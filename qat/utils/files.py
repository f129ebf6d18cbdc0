"""Atomic writes, locked folders, checksums, and system errors that name their file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qat.errors import UserError


def expand(path: str) -> str:
    """Return a path with `~` replaced by the home folder. Errors: UserError where that is not known."""
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise UserError(f"{path}: the home folder is not known; set HOME, or write the path in full")
    return full


def replace(path: Path, content: str | bytes) -> None:
    """Write a file atomically: whatever happens, a reader sees the old content or the new. For one writer at a time."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with naming(temporary):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # a disk may be full: do not leave half a file on it
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(target: Path, durable: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `target` to write into; at the end it takes the place of `target`, as `publish`.

    After an error nothing of it is left.
    """
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    try:
        with naming(temporary):
            temporary.mkdir(parents=True)
            yield temporary
        publish(temporary, target, durable)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a disk may be full: do not leave half of it there


def publish(folder: Path, target: Path, durable: bool = True) -> None:
    """Move a folder to `target`, in the place of what is there. durable: write all of it out to the disk before."""
    for path in (*folder.rglob("*"), folder) if durable else ():
        flush(path)
    if target.exists():
        remove(target)
    os.rename(folder, target)
    flush(target.parent)


def cached_json(path: Path) -> Any:
    """Return the content of a JSON file in the cache; None where it is to be made.

    That is where it is missing and, with a warning, where it is damaged or empty.
    """
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError):
        if content := json.loads(path.read_text(encoding="utf-8")):
            return content
    print(f"warning: {path} is damaged and made again", flush=True)
    return None


@contextlib.contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Lock a folder, made when missing, for writing. While another process holds it, print which one and wait.

    name: of the folder, in that message. The system releases the lock when the process ends, however it ends. On NFS
    the lock also holds between machines; on Lustre too when mounted with `flock`, otherwise it raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"{name}: waiting for {file.read()}, which works on it; Ctrl-C stops waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        yield


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def checksums(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files in the format of `sha256sum`."""
    lines = []
    for path in sorted(paths):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines)


def flush(path: Path) -> None:
    """Write a file or folder out to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


REMOVING = ".removing-"  # beginning of the name of a folder that is being removed


def remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that nobody takes a half-removed folder for a whole one.

    What cannot be removed is a warning, not an error: on NFS and FUSE an open file stays in its folder.
    """
    try:
        folder = folder.rename(folder.with_name(f"{REMOVING}{time.time_ns()}"))  # needs no room on a full disk
        shutil.rmtree(folder)
    except OSError as error:
        print(f"\nwarning: {folder} cannot be removed yet ({error.strerror}); delete it if it stays", flush=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let OSErrors within this context name `path`: for a failed write Python does not.

    safetensors reports a system error as text in an error of its own; that becomes an OSError too.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
