"""A local cache of tokens that runs share: the text is read from the network and tokenized once for all of them.

$HIF8_CACHE/tokens/<data set>/   source.json      the revision that all runs stay on, and its held-out documents
    <order of documents>/        <block>.npy      its tokens
                                 <block>.json     their checksum, what they are of, and the block that follows
                                 wanted/<block>   a process waits for it

A block is what can be read without anything before it, so it does not matter which process tokenizes it: each row group
is downloaded once, and a damaged block is simply made again. One process at a time makes blocks, with the lock held: a
thread of the first that comes serves them all, and another one takes over when its process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy

from qat.config import DataConfig
from qat.data import hub, sources
from qat.data.tokenize import check, in_background, in_groups
from qat.models.tokenizer import SentencePiece, document_token
from qat.utils import files
from qat.utils.environment import cache_dir

_POLL = 0.1  # seconds between two looks for a block, or for one that is wanted


class Cached(NamedTuple):
    """One block of the cache."""

    tokens: numpy.ndarray  # uint16 or uint32 [tokens]
    of: dict  # see `qat.data.sources.Corpus`
    after: tuple[int, int]  # epoch and first of the block that follows


class CachedTokens:
    """`qat.data.tokenize.Tokens` out of the cache, with cursors that either of them understands."""

    def __init__(self, stream: sources.Stream, tokenizer, state: dict | None = None):
        self.corpus, self.tokenizer = stream, tokenizer
        self.folder = _folder(stream.cfg) / _order(stream, tokenizer)
        start = {"epoch": 0, "block": 0, "taken": 0} | (state or {"order": stream.order})
        self.epoch, self.block, self.taken = start["epoch"], start["block"], start["taken"]
        self.current = self._obtain(start)

    def state(self) -> dict:
        return {
            "order": self.corpus.order,
            "of": self.current.of,
            "epoch": self.epoch,
            "block": self.block,
            "document": 0,
            "pending": [],
            "taken": self.taken,
            "skip": self.taken,
        }

    def take(self, count: int) -> numpy.ndarray:
        """The next int32 tokens [count]."""
        taken = numpy.empty(count, numpy.int32)
        done = 0
        while done < count:
            if self.taken == len(self.current.tokens):
                before = self.state()
                (self.epoch, self.block), self.taken = self.current.after, 0
                self.current = self._obtain(before)
            piece = self.current.tokens[self.taken : self.taken + count - done]
            taken[done : done + len(piece)] = piece
            self.taken, done = self.taken + len(piece), done + len(piece)
        return taken

    def _obtain(self, before: dict) -> Cached:
        """The current block, from whoever makes it; the one that follows is wanted from now on.

        before: a cursor into the same text. Errors: those of making the block here.
        """
        name = _name(self.epoch, self.block)
        while (found := _read(self.folder / name)) is None:
            self._want(name)
            filler = _fillers.get(self.folder)
            if filler is not None and not filler.is_alive():
                raise _fillers.pop(self.folder).error
            time.sleep(_POLL)
        check(before, self.corpus, found.of)
        following = _name(*found.after)
        if not _facts(self.folder / following).exists():
            self._want(following)
        return found

    def _want(self, name: str) -> None:
        """Have a block made, in this process unless another one does it."""
        _wanted(self.folder, name).touch()
        if self.folder not in _fillers and (lock := _lock(self.folder)) is not None:
            _fillers[self.folder] = _Filler(self, lock)
            _fillers[self.folder].start()


class _Filler(threading.Thread):
    """Makes what is wanted in one folder of the cache, as long as the process lives."""

    def __init__(self, asking: CachedTokens, lock: IO):
        super().__init__(name="token cache")
        self.folder, self.corpus, self.tokenizer = asking.folder, asking.corpus, asking.tokenizer
        self.lock, self.error = lock, None
        self.blocks: Iterator[sources.Block] | None = None
        self.upcoming: tuple[int, int] | None = None  # of self.blocks

    def run(self) -> None:
        with self.lock:
            try:
                while True:
                    hub.alive()
                    for wanted in sorted(_wanted(self.folder).iterdir()):
                        self._make(wanted.name)
                        wanted.unlink()
                    time.sleep(_POLL)
            except Exception as error:  # for the thread that asked
                self.error = error

    def _make(self, name: str) -> None:
        if _read(self.folder / name) is not None:
            return
        place = tuple(map(int, name.split("-")))
        if self.upcoming != place:
            self.blocks = self.corpus.blocks(*place)
        block = next(self.blocks)
        self.upcoming = block.after
        kind = numpy.uint16 if len(self.tokenizer) <= 2**16 else numpy.uint32
        pieces = [numpy.empty(0, kind)]
        for _, group in in_background(in_groups(block.documents), self.tokenizer, self.corpus.cfg.tokenizer_threads):
            hub.alive()
            pieces.append(numpy.fromiter(itertools.chain.from_iterable(group), kind))
        content = io.BytesIO()
        numpy.save(content, numpy.concatenate(pieces))
        facts = {"checksum": _checksum(content.getvalue()), "of": self.corpus.of, "after": block.after}
        files.replace(_tokens(self.folder / name), content.getvalue())
        files.replace(_facts(self.folder / name), json.dumps(facts))


_fillers: dict[Path, _Filler] = {}  # of this process


def source(cfg: DataConfig, seed: int) -> sources.Stream:
    """The data set at the revision that the cache has begun with, which is asked for once."""
    stream = sources.Stream(cfg, seed)
    if stream.local:
        return stream
    folder = _folder(cfg)
    file = folder / "source.json"
    with files.lock(folder, cfg.path):
        known = files.cached_json(file)
        if not known:
            known = {"revision": stream.revision, "kept": stream.kept}
            files.replace(file, json.dumps(known))
    return sources.Stream(cfg, seed, **known)


def _folder(cfg: DataConfig) -> Path:
    name = "-".join(filter(None, [cfg.path.strip("/").replace("/", "_"), cfg.subset]))
    return cache_dir() / "tokens" / f"{name}-{_key(cfg.path, cfg.subset, cfg.revision, sources.HELDOUT_DOCUMENTS)}"


def _order(stream: sources.Stream, tokenizer) -> str:
    """A name for what the order of tokens depends on, beside the data set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else [type(tokenizer).__name__, tokenizer.get_vocab()]
    if isinstance(tokenizer, SentencePiece):  # pieces alone do not tell how text is cut into them
        words = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    rule = stream.order, stream.revision, stream.seed, stream.cfg.shuffle_buffer
    return f"seed{stream.seed}-{_key(*rule, document_token(tokenizer), words)}"


def _key(*parts) -> str:
    return _checksum(json.dumps(parts, sort_keys=True).encode())[:12]


def _name(epoch: int, first: int) -> str:
    return f"{epoch:03}-{first:07}"


def _tokens(path: Path) -> Path:
    return path.with_name(f"{path.name}.npy")


def _facts(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _wanted(folder: Path, name: str = "") -> Path:
    """The folder of what is wanted, or the file for a block; made anew where a scratch disk was tidied."""
    (folder / "wanted").mkdir(parents=True, exist_ok=True)
    return folder / "wanted" / name


def _read(path: Path) -> Cached | None:
    """A block, or None when it is not there; a damaged one is as good as none from then on."""
    try:
        facts = json.loads(_facts(path).read_bytes())
        content = _tokens(path).read_bytes()
        if _checksum(content) == facts["checksum"]:
            return Cached(numpy.load(io.BytesIO(content)), facts["of"], tuple(facts["after"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # as damaged as a wrong checksum
        pass
    print(f"\nwarning: {_tokens(path)} is damaged and made again", flush=True)
    _facts(path).unlink(missing_ok=True)
    return None


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()


def _lock(folder: Path) -> IO | None:
    """An open file that holds the folder's lock; None when another process holds it."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / ".lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        stack.pop_all()
        return file
