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

HELDOUT_DOCUMENTS = 1000  # so many leading documents are never trained on
_AHEAD = 16  # row groups read ahead: about a block and a half of FineWeb, 50 MB
_ROWS = 1000  # read at once; left to itself, `datasets` takes as many as the file's first row group has: maybe none
_LEAST_READ = 2**16  # bytes a request: more is asked for only where it is wanted


class ParquetFiles(Corpus):
    """The `text` column of a Hugging Face data set of Parquet files, or of a local folder of such.

    A shard is a row group: a thousand documents of FineWeb. Each epoch permutes the shards; those that follow each
    other make up blocks of at least `data.shuffle_buffer` documents. Reading a shard fetches its text and its file's
    footer, and nothing that comes before it. With `data.cache` its tokens, and what is known of the data set, stay on
    disk for all runs, whatever their seed.
    """

    def __init__(self, cfg: DataConfig, seed: int, revision: str | None = None):
        """revision: a commit to stay on, whatever the branch has come to."""
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

        known = functools.partial(HfApi().dataset_info, self.cfg.path, revision=self.cfg.revision, timeout=hub.SILENCE)
        return self._known(self.cache, self.cfg.revision or "newest", lambda: known().sha, "the data set")

    @functools.cached_property
    def held_out(self) -> list[str]:
        """The held-out documents."""
        return self._known(
            self._folder, "heldout", lambda: _texts(self._files.take(HELDOUT_DOCUMENTS)), "its held-out text"
        )

    @functools.cached_property
    def shards(self) -> int:
        """The number of row groups."""
        return self._known(self._folder, "shards", lambda: self._row_groups.num_shards, "the list of row groups")

    @property
    def facts(self) -> dict:
        return {"order": STREAM_ORDER, "revision": self.revision, "shards": self.shards}

    def heldout(self) -> Iterator[str]:
        return iter(self.held_out)

    def _epoch(self, tokenizer, epoch: int, block: int, number: int) -> Iterator[tuple[int, int, Sequence[int]]]:
        order = list(range(self.shards))
        self._shuffle(order, epoch)
        read = self._reader(tokenizer)
        readers = self.cfg.tokenizer_threads + 1  # one waits for the network, most of the time
        documents = []
        shards = tokenize.in_background(read, order[block:], readers, _AHEAD)
        for after, (shard, first_try) in enumerate(shards, block + 1):
            # Waiting for the hub is left to the thread that asks; what a failed try has read is thrown away.
            tries = itertools.chain([first_try.result], itertools.repeat(functools.partial(read, shard)))
            documents += self._retried(lambda tries=tries: next(tries)(), f"row group {shard}")
            if len(documents) >= self.cfg.shuffle_buffer or after == len(order):
                self._shuffle(documents, epoch, block)
                yield from ((block, place, tokens) for place, tokens in enumerate(documents[number:], number))
                block, number, documents = after, 0, []

    def _reader(self, tokenizer) -> Callable[[int], list[numpy.ndarray]]:
        """Return what reads the tokens of a row group's documents."""
        held_out, kind = set(self.held_out), token_cache.dtype(tokenizer)
        encode = functools.partial(tokenize.encode, tokenizer, separator=document_token(tokenizer))
        folder = self._folder and self._folder / token_cache.key(tokenizer)

        def make(shard: int) -> list[numpy.ndarray]:
            with self.opening:
                row_groups = self._row_groups
            rows = row_groups.shard(num_shards=row_groups.num_shards, index=shard)
            texts = [text for text in _texts(rows) if text not in held_out]
            return [numpy.array(tokens, kind) for group in tokenize.groups(texts) for tokens in encode(group)]

        if folder is None:
            return make
        return lambda shard: token_cache.load(folder / f"{shard:07}.npz", functools.partial(make, shard))

    @property
    def _folder(self) -> Path | None:
        """Return where the cache keeps this revision."""
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
            if "doesn't have a '" not in str(error):  # these options are those of Parquet alone
                raise
            raise ValueError(
                f"its files are not Parquet; make them so by `datasets.load_dataset('{self.cfg.path}', split='train')"
                f".to_parquet('text.parquet')`, or for .txt set data.source=files"
            ) from None
        except FileNotFoundError as error:  # also said of a README that the hub could not send
            raise error if self.local else ConnectionError(str(error)) from error
        if getattr(dataset.features.get("text"), "dtype", None) not in ("string", "large_string"):
            raise ValueError("it has no column named text that holds strings")
        return dataset

    @functools.cached_property
    def _row_groups(self):
        """The same split into row groups: this reads the footer of every file."""
        return self._files.reshard()

    def _known(self, folder: Path | None, name: str, ask: Callable, what: str):
        """Return a fact of the data set, asked for once for all runs that share a cache."""
        ask = functools.partial(self._retried, ask, what)
        return ask() if folder is None else token_cache.fact(folder, name, ask, self.cfg.path)

    def _retried(self, attempt: Callable, what: str):
        if not self.local:
            return hub.retry(attempt, self.cfg, what)
        try:
            return attempt()
        except (OSError, ValueError, TypeError) as error:
            raise hub.unusable(self.cfg, self._damage() or error) from error

    def _damage(self) -> Exception | None:
        """Return what is wrong with the first file of a local folder that is not Parquet; `datasets` does not say which
        it is."""
        for file in sorted(Path(self.path).rglob("*.parquet")):
            try:
                pyarrow.parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                return ValueError(f"{file.name}: {error}; remove it, or make it again")
        return None


def _texts(rows) -> list[str]:
    return [row["text"] for row in rows if row["text"]]  # neither null nor empty
