"""Files that are there whole or not at all, and errors of the system that say which file they are about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with naming(temporary):
            temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # what is left of it would fill a full disk further
            temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Hand a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system within this context name `path`: where a write fails, Python does not say."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
