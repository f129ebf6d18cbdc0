"""Hash the model and texts that a run is made from: its id has only their paths, where files may change."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from qat.config import Config, ModelConfig
from qat.utils.environment import source_path

_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


def hashes(cfg: Config) -> dict[str, str]:
    """Return {"model.path=...": hash} for the model and both texts; for a hub model its commit.

    Random models are left out, and texts whose revision is part of the run's id: those of a hub, and prepared ones.
    Errors: UserError for a missing path.
    """
    model = {} if cfg.model.source == "random" else {f"model.path={cfg.model.path}": _hash_model(cfg.model)}
    texts = [text for text in (cfg.data, cfg.validation) if text is not None and text.source != "prepared"]
    paths = [(text, source_path(text.source, text.path)) for text in texts]
    return model | {text.named: _hash_text(path) for text, path in paths if text.source != "hub" or path.is_dir()}


def _hash_model(cfg: ModelConfig) -> str:
    path = source_path(cfg.source, cfg.path)
    if cfg.source == "package":
        return _hash_files([path])
    if path.is_dir():
        return _hash_files(file for file in path.iterdir() if file.suffix in _MODEL_SUFFIXES)
    from qat.models.load import resolve_commit  # imports transformers, which takes seconds

    return resolve_commit(cfg)


def _hash_text(path: Path) -> str:
    return _hash_files([path] if path.is_file() else path.rglob("*"))


def _hash_files(paths: Iterable[Path]) -> str:
    """Return one hash of all files and their names."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in paths if path.is_file()):
        status = file.stat()
        digest.update(f"{file.name} {_hash_file(file, status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _hash_file(file: Path, size: int, modified: int) -> str:
    """Return the hash of a file; of Parquet only its footer, which has the place, size and range of every column."""
    with file.open("rb") as content:
        if file.suffix == ".parquet" and size > 8:
            content.seek(-8, 2)
            content.seek(max(0, size - 8 - int.from_bytes(content.read(4), "little")))
        return hashlib.file_digest(content, "blake2b").hexdigest()
