"""Hashes of the files that a run is made of. A run is named by their paths, which may come to hold other files."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from qat.config import Config, DataConfig, ModelConfig
from qat.utils import files
from qat.utils.environment import package_path

_OF_MODELS = (".json", ".safetensors", ".model", ".txt", ".jinja")


def hashes(cfg: Config) -> dict[str, str]:
    """Return {"model.path=...": hash} of the model and both texts; of a hub model its commit. Random models and
    texts of a hub, or named by their revision, are left out. Errors: UserError where there is nothing."""
    found = {} if cfg.model.source == "random" else {f"model.path={cfg.model.path}": _of_model(cfg.model)}
    texts = (text for text in (cfg.data, cfg.validation) if text is not None and text.source != "prepared")
    return found | {text.named: _of_text(text) for text in texts if text.source != "hub" or _path(text).is_dir()}


def _of_model(cfg: ModelConfig) -> str:
    if cfg.source == "package":
        return _together([package_path(cfg.path)])
    if _path(cfg).is_dir():
        return _together(file for file in _path(cfg).iterdir() if file.suffix in _OF_MODELS)
    from qat.models.load import resolve_commit  # transformers takes seconds to import, and only a hub's models need it

    return resolve_commit(cfg)


def _of_text(cfg: DataConfig) -> str:
    path = package_path(cfg.path) if cfg.source == "package" else _path(cfg)
    return _together([path] if path.is_file() else path.rglob("*"))


def _path(cfg: ModelConfig | DataConfig) -> Path:
    return Path(files.expand(cfg.path))


def _together(paths: Iterable[Path]) -> str:
    """Return one hash of files and their names."""
    whole = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in paths if path.is_file()):
        status = file.stat()
        whole.update(f"{file.name} {_of_file(file, status.st_size, status.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@functools.cache
def _of_file(file: Path, size: int, modified: int) -> str:
    """Return the hash of a file; of Parquet, of its footer, which has the place, size and range of every column."""
    with file.open("rb") as content:
        if file.suffix == ".parquet" and size > 8:
            content.seek(-8, 2)
            content.seek(max(0, size - 8 - int.from_bytes(content.read(4), "little")))
        return hashlib.file_digest(content, "blake2b").hexdigest()
