"""Stream Parquet files from the Hugging Face hub (FineWeb), or from a local folder."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
import pyarrow.parquet

from qat.config import STREAM_ORDER, DataConfig
from qat.data import hub, token_cache, tokenize
from qat.data.sources import Corpus, inventory
from qat.models.tokenizer import document_token
from qat.utils import files

HELDOUT_DOCUMENTS = 1000  # the first so many documents are never trained on
_AHEAD = 16  # row groups read ahead: about a block and a half of FineWeb, 50 MB
_ROWS = 1000  # rows read at once; by default `datasets` takes the size of the file's first row group, which may be 0
_LEAST_READ = 2**16  # bytes of the smallest request to the hub


class ParquetFiles(Corpus):
    """The `text` column of a Hugging Face data set of Parquet files, or of a local folder of such files.

    A shard is a row group: a thousand documents of FineWeb. Each epoch permutes the shards; consecutive ones form
    blocks of at least `data.shuffle_buffer` documents. Reading a shard fetches its text and its file's footer, and
    nothing before it. With `data.cache`, tokens and facts of the data set stay on disk for all runs and seeds.
    """

    def __init__(self, cfg: DataConfig, seed: int, revision: str | None = None):
        """revision: a commit to stay on even if the branch moves."""
        super().__init__(cfg, seed)
        self.path = files.expand(cfg.path)
        self.local = Path(self.path).is_dir()
        self.cache = token_cache.folder(cfg, HELDOUT_DOCUMENTS) if cfg.cache else None
        self.opening = threading.Lock()
        hub.prepare()
        if revision and not self.local:
            self.revision = revision

    @functools.cached_property
    def revision(self) -> str:
        """The commit of a data set on the hub; of a local folder, a hash of its files' names and sizes."""
        if self.local:
            folder = Path(self.path)
            return inventory(folder, sorted(f for f in folder.rglob("*") if f.is_file()))
        from huggingface_hub import HfApi

        def ask() -> str:
            return HfApi().dataset_info(self.cfg.path, revision=self.cfg.revision, timeout=hub.SILENCE).sha

        return self._fact(self.cache, self.cfg.revision or "newest", ask, "the data set")

    @functools.cached_property
    def held_out(self) -> list[str]:
        """The held-out documents."""
        return self._fact(
            self._folder, "heldout", lambda: _texts(self._files.take(HELDOUT_DOCUMENTS)), "its held-out text"
        )

    @functools.cached_property
    def shards(self) -> int:
        """The number of row groups."""
        return self._fact(self._folder, "shards", lambda: self._row_groups.num_shards, "the list of row groups")

    @property
    def facts(self) -> dict:
        return {"order": STREAM_ORDER, "revision": self.revision, "shards": self.shards}

    def heldout(self) -> Iterator[str]:
        return iter(self.held_out)

    def _epoch(self, tokenizer, epoch: int, block: int, number: int) -> Iterator[tuple[int, int, Sequence[int]]]:
        order = list(range(self.shards))
        self._shuffle(order, epoch)
        read = self._reader(tokenizer)
        threads = self.cfg.tokenizer_threads + 1  # one of them usually waits for the network
        documents = []
        shards = tokenize.in_background(read, order[block:], threads, _AHEAD)
        for next_block, (shard, first_try) in enumerate(shards, block + 1):
            # Where the background thread failed, this thread waits for the hub and reads the whole shard again.
            tries = itertools.chain([first_try.result], itertools.repeat(functools.partial(read, shard)))
            documents += self._retry(lambda tries=tries: next(tries)(), f"row group {shard}")
            if len(documents) >= self.cfg.shuffle_buffer or next_block == len(order):
                self._shuffle(documents, epoch, block)
                yield from ((block, position, tokens) for position, tokens in enumerate(documents[number:], number))
                block, number, documents = next_block, 0, []

    def _reader(self, tokenizer) -> Callable[[int], list[numpy.ndarray]]:
        """Return a function that returns the tokens of each document of a row group."""
        held_out, dtype = set(self.held_out), token_cache.dtype(tokenizer)
        encode = functools.partial(tokenize.encode, tokenizer, separator=document_token(tokenizer))
        folder = self._folder and self._folder / token_cache.key(tokenizer)

        def make(shard: int) -> list[numpy.ndarray]:
            with self.opening:
                row_groups = self._row_groups
            rows = row_groups.shard(num_shards=row_groups.num_shards, index=shard)
            texts = [text for text in _texts(rows) if text not in held_out]
            return [numpy.array(tokens, dtype) for group in tokenize.groups(texts) for tokens in encode(group)]

        if folder is None:
            return make
        return lambda shard: token_cache.load(folder / f"{shard:07}.npz", functools.partial(make, shard))

    @property
    def _folder(self) -> Path | None:
        """The cache folder of this revision; None without a cache."""
        return self.cache and self.cache / self.revision

    @functools.cached_property
    def _files(self):
        """The data set in its own order, as `datasets` streams it."""
        import datasets

        try:
            dataset = datasets.load_dataset(
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
            if "doesn't have a '" not in str(error):  # said of our options, which only Parquet has
                raise
            raise ValueError(
                f"its files are not Parquet; make them so by `datasets.load_dataset('{self.cfg.path}', split='train')"
                f".to_parquet('text.parquet')`, or for .txt set data.source=files"
            ) from None
        except FileNotFoundError as error:  # also raised when the hub could not send the README
            raise error if self.local else ConnectionError(str(error)) from error
        if getattr(dataset.features.get("text"), "dtype", None) not in ("string", "large_string"):
            raise ValueError("it has no column named text that holds strings")
        return dataset

    @functools.cached_property
    def _row_groups(self):
        """The data set with row groups as its shards. This reads the footer of every file."""
        return self._files.reshard()

    def _fact(self, folder: Path | None, name: str, ask: Callable, what: str):
        """Return a fact of the data set, asked for once by all runs that share a cache."""
        ask = functools.partial(self._retry, ask, what)
        return ask() if folder is None else token_cache.fact(folder, name, ask, self.cfg.path)

    def _retry(self, attempt: Callable, what: str):
        """Return attempt(), repeated while a hub cannot be reached. Errors: UserError."""
        if not self.local:
            return hub.retry(attempt, self.cfg, what)
        try:
            return attempt()
        except (OSError, ValueError, TypeError) as error:
            raise hub.unusable(self.cfg, self._damage() or error) from error

    def _damage(self) -> Exception | None:
        """Return an error that names the first damaged Parquet file of a local folder, which `datasets` does not."""
        for file in sorted(Path(self.path).rglob("*.parquet")):
            try:
                pyarrow.parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                return ValueError(f"{file.name}: {error}; remove it, or make it again")
        return None


def _texts(rows) -> list[str]:
    return [row["text"] for row in rows if row["text"]]  # neither null nor empty
