"""Sources of text: documents in blocks, shuffled by the seed. A block can be read without any that comes before it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet

from qat.config import STREAM_ORDER, DataConfig
from qat.data import hub, manuals
from qat.errors import UserError
from qat.utils import files
from qat.utils.environment import package_path

PASSAGE = 4000  # characters: a speech is cut into documents of about the length of a web page
HELDOUT_EVERY = 20  # of the files, one in so many is never trained on
HELDOUT_DOCUMENTS = 1000  # of a stream, so many leading documents are never trained on
_READERS = 2  # threads
_AHEAD = 16  # shards read ahead: about a block and a half of FineWeb, 50 MB
_ROWS = 1000  # read at once; left to itself, `datasets` takes as many as the file's first row group has: maybe none
_LEAST_READ = 2**16  # bytes a request: more is asked for only where it is wanted


class Block(NamedTuple):
    """Documents that are shuffled together."""

    epoch: int
    first: int  # its place in the epoch: the number of shards before it
    documents: list[str]
    after: tuple[int, int]  # epoch and first of the block that follows


class Corpus:
    """Documents in a seeded order, apart from those held out."""

    order: int  # of the rule that orders the documents: a cursor of another rule means something else
    of: dict  # what tells this text from a later state of it; JSON-able

    def __init__(self, cfg: DataConfig, seed: int):
        self.cfg, self.seed = cfg, seed

    def blocks(self, epoch: int = 0, first: int = 0) -> Iterator[Block]:
        """The blocks from this one on, epoch after epoch, for ever. Each epoch has each document once."""
        while True:
            found = 0
            for block in self._epoch(epoch, first):
                found += len(block.documents)
                yield block
            if not found and not first:
                raise UserError(f"{self.cfg.named}: holds no documents to train on")
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int, first: int) -> Iterator[Block]:
        raise NotImplementedError

    def heldout(self) -> Iterator[str]:
        """Documents that no block has, in a fixed order."""
        raise NotImplementedError


class Files(Corpus):
    """The .txt files of a folder and those below it. Files, not passages, are held out, so that no held-out text has
    trained neighbours."""

    order = 1

    def __init__(self, cfg: DataConfig, seed: int):
        super().__init__(cfg, seed)
        folder = _folder(cfg)
        named = sorted(f for f in folder.rglob("*") if f.suffix.lower() == ".txt" and not f.is_dir())
        files = [f for f in named if f.stat().st_size]
        if len(files) < 2:
            raise UserError(f"{cfg.named}: needs a folder with at least two .txt files, found {len(files)}")
        self.kept = files[::HELDOUT_EVERY]
        self.train = [f for place, f in enumerate(files) if place % HELDOUT_EVERY]
        self.of = {"revision": _inventory(folder, files)}

    def _epoch(self, epoch: int, first: int) -> Iterator[Block]:
        passages = [p for f in self.train for p in self._passages(f)]
        random.Random(f"{self.seed}/{epoch}").shuffle(passages)
        yield Block(epoch, 0, passages, (epoch + 1, 0))

    def heldout(self) -> Iterator[str]:
        # One passage of each file in turn: a short measurement still sees every held-out file.
        columns = itertools.zip_longest(*(self._passages(f) for f in self.kept))
        return (passage for row in columns for passage in row if passage is not None)

    def _passages(self, file: Path) -> list[str]:
        try:
            return _passages(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.cfg.named}: {file.name} is not text in UTF-8 ({error}); convert or remove it"
            ) from error


class Stream(Corpus):
    """The `text` column of a Hugging Face data set of Parquet files, streamed (FineWeb), or of a local folder of such.

    A shard is a row group: a thousand documents of FineWeb. Each epoch permutes the shards; those that follow each
    other make up blocks of at least `data.shuffle_buffer` documents. Reading a shard fetches its text and its file's
    footer, and nothing that comes before it.
    """

    order = STREAM_ORDER

    def __init__(self, cfg: DataConfig, seed: int, revision: str | None = None, kept: list[str] | None = None):
        """revision, kept: a commit to stay on, whatever the branch has come to, and its held-out documents, where they
        are known."""
        super().__init__(cfg, seed)
        self.path = files.expand(cfg.path)
        self.local = Path(self.path).is_dir()
        hub.prepare()
        if revision and not self.local:
            self.revision = revision
        if kept:
            self.kept = kept

    @functools.cached_property
    def revision(self) -> str:
        """The commit of a data set on the hub; of a local folder, a hash of its files' names and sizes."""
        if self.local:
            folder = Path(self.path)
            return _inventory(folder, sorted(f for f in folder.rglob("*") if f.is_file()))
        from huggingface_hub import HfApi

        known = functools.partial(HfApi().dataset_info, self.cfg.path, revision=self.cfg.revision, timeout=hub.SILENCE)
        return self._insist(lambda: known().sha, "the data set")

    @functools.cached_property
    def kept(self) -> list[str]:
        """The held-out documents."""
        return self._insist(lambda: _texts(self._files.take(HELDOUT_DOCUMENTS)), "its held-out text")

    @functools.cached_property
    def of(self) -> dict:
        return {"revision": self.revision, "shards": self._shards.num_shards}

    def heldout(self) -> Iterator[str]:
        return iter(self.kept)

    def _load(self):
        import datasets

        try:
            found = datasets.load_dataset(
                self.path,
                name=self.cfg.subset,
                split="train",
                streaming=True,
                revision=None if self.local else self.revision,
                columns=["text"],
                batch_size=_ROWS,
                storage_options={"hf": {"block_size": _LEAST_READ}},
            )
        except datasets.exceptions.FileNotFoundDatasetsError:
            raise
        except ValueError as error:
            if "doesn't have a '" not in str(error):  # these options are those of Parquet alone
                raise
            raise ValueError(
                f"its files are not Parquet; make them so by `datasets.load_dataset('{self.cfg.path}', split='train')"
                f".to_parquet('text.parquet')`, or for .txt set data.source=files"
            ) from None
        except FileNotFoundError as error:  # also said of a README that the hub could not send
            raise error if self.local else ConnectionError(str(error)) from error
        if getattr(found.features.get("text"), "dtype", None) not in ("string", "large_string"):
            raise ValueError("it has no column named text that holds strings")
        return found

    @functools.cached_property
    def _files(self):
        """The data set in its own order."""
        return self._insist(self._load, "its list of files")

    @functools.cached_property
    def _shards(self):
        """The same split into row groups: this reads the footer of every file."""
        return self._insist(self._files.reshard, "its list of row groups")

    def _epoch(self, epoch: int, first: int) -> Iterator[Block]:
        kept, total = set(self.kept), self._shards.num_shards
        order = list(range(total))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        documents: list[str] = []
        for after, shard in enumerate(self._in_order(order[first:]), first + 1):
            documents += [text for text in shard if text not in kept]
            if len(documents) >= self.cfg.shuffle_buffer or after == total:
                random.Random(f"{self.seed}/{epoch}/{first}").shuffle(documents)
                yield Block(epoch, first, documents, (epoch, after) if after < total else (epoch + 1, 0))
                first, documents = after, []

    def _in_order(self, numbers: list[int]) -> Iterator[list[str]]:
        """The documents of each shard, read ahead in background threads."""
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        waiting: deque[tuple[int, Future]] = deque()
        try:
            for number in numbers:
                waiting.append((number, pool.submit(self._read, number)))
                if len(waiting) > _AHEAD:
                    yield self._read_at_last(*waiting.popleft())
            while waiting:
                yield self._read_at_last(*waiting.popleft())
        finally:  # without waiting: the garbage collector may end this generator in one of the pool's own threads
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, number: int) -> list[str]:
        return _texts(self._shards.shard(num_shards=self._shards.num_shards, index=number))

    def _read_at_last(self, number: int, first_try: Future) -> list[str]:
        """A shard's documents; what a failed try has read is thrown away. Waiting is left to the thread that asks."""
        tries = itertools.chain([first_try.result], itertools.repeat(functools.partial(self._read, number)))
        return self._insist(lambda: next(tries)(), f"row group {number}")

    def _insist(self, attempt, what: str):
        if not self.local:
            return hub.retry(attempt, self.cfg, what)
        try:
            return attempt()
        except (OSError, ValueError, TypeError) as error:
            raise hub.unusable(self.cfg, self._damage() or error) from error

    def _damage(self) -> Exception | None:
        """What is wrong with the first file of a local folder that is not Parquet; `datasets` does not say which."""
        for file in sorted(Path(self.path).rglob("*.parquet")):
            try:
                pyarrow.parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                return ValueError(f"{file.name}: {error}; remove it, or make it again")
        return None


def _folder(cfg: DataConfig) -> Path:
    if cfg.source == "package":
        return package_path(cfg.path)
    return manuals.folder(cfg) if cfg.source == "prepared" else Path(files.expand(cfg.path))


def _texts(rows) -> list[str]:
    return [row["text"] for row in rows if row["text"]]  # neither null nor empty


def _inventory(folder: Path, files: list[Path]) -> str:
    """A hash of the names and sizes of files."""
    lines = [f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _passages(text: str) -> list[str]:
    """Cut a text at paragraph ends into pieces of about PASSAGE characters."""
    passages, size = [[]], 0
    for paragraph in text.split("\n\n"):
        if size >= PASSAGE:
            passages.append([])
            size = 0
        passages[-1].append(paragraph.strip())
        size += len(paragraph)
    return ["\n\n".join(p) for p in passages if any(p)]
