"""Keep tokens on disk, so that the runs of a suite read from the network once.

$HIF8_CACHE/tokens/<data set>/   facts.json       {`data.revision`, or "newest": its commit}
    <commit>/                    facts.json       its number of row groups and its held-out documents
        <tokenizer>/             <number>.npz     tokens of a row group, and where each document ends

The first process that needs a row group reads and tokenizes it; others wait for that. A .npz file has checksums, and a
damaged one is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy

from qat.config import DataConfig
from qat.models.tokenizer import SentencePiece, document_token
from qat.utils import files
from qat.utils.environment import cache_dir

_LOCKS = 64  # lock files in a folder; row groups that share one wait for each other


def load(path: Path, make: Callable[[], list[numpy.ndarray]]) -> list[numpy.ndarray]:
    """Return the tokens of each document in a cache file. A missing or damaged file is written from make()."""
    documents = _read(path)
    if documents is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".lock{int(path.stem) % _LOCKS}")):
            documents = _read(path)  # another process may have written it
            if documents is None:
                if path.exists():
                    print(f"\nwarning: {path} is damaged and made again", flush=True)
                documents = make()
                files.replace(path, _packed(documents))
    return documents


def fact(folder: Path, name: str, ask: Callable[[], Any], what: str) -> Any:
    """Return an entry of a folder's facts.json, from ask() where it is missing. what: printed to waiting processes."""
    with files.lock(folder, what):
        facts = files.cached_json(folder / "facts.json") or {}
        if name not in facts:
            facts[name] = ask()
            files.replace(folder / "facts.json", json.dumps(facts))
    return facts[name]


def folder(cfg: DataConfig, heldout: int) -> Path:
    """Return the folder of a data set. heldout: how many of its documents are held out."""
    name = "-".join(filter(None, [cfg.path.strip("/").replace("/", "_"), cfg.subset]))
    return cache_dir() / "tokens" / f"{name}-{_hash(cfg.path, cfg.subset, heldout)}"


def key(tokenizer) -> str:
    """Return a hash of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(tokenizer, SentencePiece):  # its vocabulary does not tell how text is cut
        definition = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    elif backend is not None:
        definition = backend.to_str()
    else:
        definition = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return _hash(document_token(tokenizer), definition)


def dtype(tokenizer) -> type:
    """Return the smallest type that holds every token."""
    return numpy.uint16 if len(tokenizer) <= 2**16 else numpy.uint32


def _packed(documents: list[numpy.ndarray]) -> bytes:
    content = io.BytesIO()
    tokens = numpy.concatenate(documents) if documents else numpy.empty(0, numpy.uint16)
    numpy.savez(content, tokens=tokens, ends=numpy.cumsum([len(document) for document in documents], dtype=numpy.int64))
    return content.getvalue()


def _read(path: Path) -> list[numpy.ndarray] | None:
    """Return the documents of a file; None when it is missing or damaged."""
    try:
        with numpy.load(path) as file:
            return numpy.split(file["tokens"], file["ends"])[:-1]
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file. The system releases it when the process ends, however it ends."""
    with path.open("w") as file, files.naming(path):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash(*parts) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
