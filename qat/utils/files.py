"""Files that are there whole or not at all, folders that one process at a time writes, and errors of the system that
say which file they are about."""

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
    """Return a path as users write it, with the home folder for `~`. Errors: UserError where that is not known."""
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise UserError(f"{path}: the home folder is not known; set HOME, or write the path in full")
    return full


def replace(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees what it held or what it is to hold, whatever happens in between. One process
    at a time may do so."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with naming(temporary):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # what is left of it would fill a full disk further
            temporary.unlink(missing_ok=True)
        raise


def cached_json(path: Path) -> Any:
    """Return what a JSON file of the cache holds; None where it is missing, and, with a warning, where it is damaged or
    holds
    nothing: it is to be made again."""
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError):
        if content := json.loads(path.read_text(encoding="utf-8")):
            return content
    print(f"warning: {path} is damaged and made again", flush=True)
    return None


@contextlib.contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Hold a folder, made when missing, for writing. While another process holds it, say which and wait; name: what the
    folder is called then.

    The system takes the lock from a process that ends in whatever way. NFS carries flock to its server, so that it
    holds between machines; Lustre does when it is mounted with `flock`, and else raises OSError.
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
    """Return the folder, or the one that is to hold it."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def checksums(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files, as `sha256sum` writes and checks them."""
    lines = []
    for path in sorted(paths):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines)


def flush(path: Path) -> None:
    """Hand a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


REMOVING = ".removing-"  # what a folder's name begins with once it is to go


def remove(folder: Path) -> None:
    """Remove a folder, renamed away first, so that nobody takes what is left of it for whole. What does not go is a
    warning: on NFS and FUSE a file that a process has open stays in its folder."""
    try:
        folder = folder.rename(folder.with_name(f"{REMOVING}{time.time_ns()}"))  # takes no room
        shutil.rmtree(folder)
    except OSError as error:
        print(f"\nwarning: {folder} cannot be removed yet ({error.strerror}); delete it if it stays", flush=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system within this context name `path`: where a write fails, Python does not say. Those that
    safetensors tells of in words become what they are."""
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
