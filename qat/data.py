"""Text -> tokens -> packed sequences. Documents are separated by one token, concatenated, and cut into chunks.

The order of tokens depends on the seed and on nothing else: tokenizing happens in background threads whose results
are taken in order, so every token is yielded exactly once for any number of threads. A cursor of a few numbers
restores the stream exactly.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qat.config import DataConfig, UserError
from qat.models import document_token
from qat.runtime import package_path

PASSAGE = 4000  # characters: a speech is cut into documents of about the length of a web page
HELDOUT_LENGTH = 128  # tokens a held-out sequence
HELDOUT_EVERY = 20  # of the files, one in so many is never trained on
HELDOUT_DOCUMENTS = 1000  # of a stream, so many leading documents are never trained on
_TOKENIZE = 64  # documents a background task


class Corpus:
    """Documents in a seeded order, apart from those held out."""

    def __init__(self, cfg: DataConfig, seed: int):
        self.cfg, self.seed = cfg, seed

    def documents(self, epoch: int) -> Iterator[str]:
        """Training documents of one epoch, each once."""
        raise NotImplementedError

    def heldout(self) -> Iterator[str]:
        """Documents that `documents` never yields, in a fixed order."""
        raise NotImplementedError


class Files(Corpus):
    """A folder of .txt files. Files, not passages, are held out, so that no held-out text has trained neighbours."""

    def __init__(self, cfg: DataConfig, seed: int):
        super().__init__(cfg, seed)
        folder = package_path(cfg.path) if cfg.source == "package" else Path(cfg.path)
        files = sorted(folder.glob("*.txt"))
        if len(files) < 2:
            raise UserError(f"data.path={cfg.path}: needs a folder with at least two .txt files, found {len(files)}")
        self.kept = files[::HELDOUT_EVERY]
        self.train = [f for f in files if f not in set(self.kept)]

    def documents(self, epoch: int) -> Iterator[str]:
        passages = [p for f in self.train for p in self._passages(f)]
        random.Random(f"{self.seed}/{epoch}").shuffle(passages)
        return iter(passages)

    def heldout(self) -> Iterator[str]:
        # One passage of each file in turn: a short measurement still sees every held-out file.
        columns = itertools.zip_longest(*(self._passages(f) for f in self.kept))
        return (passage for row in columns for passage in row if passage is not None)

    def _passages(self, file: Path) -> list[str]:
        try:
            return _passages(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"data.path={self.cfg.path}: {file.name} is not text in UTF-8 ({error}); convert or remove it"
            ) from error


class Stream(Corpus):
    """A Hugging Face data set with a `text` column, streamed (FineWeb). A local folder of parquet files works too."""

    def _load(self):
        import datasets

        try:
            return datasets.load_dataset(self.cfg.path, name=self.cfg.subset, split="train", streaming=True)
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"data.path={self.cfg.path}: cannot be streamed ({reason}); or use data=embedded"
            ) from error

    def documents(self, epoch: int) -> Iterator[str]:
        rest = self._load().skip(HELDOUT_DOCUMENTS)
        shuffled = rest.shuffle(seed=self.seed, buffer_size=self.cfg.shuffle_buffer)
        shuffled.set_epoch(epoch)
        return self._texts(shuffled)

    def heldout(self) -> Iterator[str]:
        return self._texts(self._load().take(HELDOUT_DOCUMENTS))

    def _texts(self, rows) -> Iterator[str]:
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise UserError(
                    f"data.path={self.cfg.path}: has no column `text` of strings, only {', '.join(row)}; name another"
                )
            yield row["text"]


def corpus(cfg: DataConfig, seed: int) -> Corpus:
    return (Stream if cfg.source == "hub" else Files)(cfg, seed)


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


class TokenStream:
    """An endless stream of packed training sequences with a cursor.

    state: {"epoch", "document" (taken in this epoch), "pending" (their tokens not yet yielded), "repeats" and "last"
    (only with duplicate_workers > 1)}, JSON-able.
    """

    def __init__(self, corpus: Corpus, tokenizer, state: dict | None = None):
        self.corpus, self.tokenizer = corpus, tokenizer
        self.separator = document_token(tokenizer)
        state = state or {"epoch": 0, "document": 0, "pending": [], "repeats": 0, "last": None}
        self.epoch, self.document, self.pending = state["epoch"], state["document"], list(state["pending"])
        self.repeats, self.last = state["repeats"], state["last"]
        self._documents = self._tokenized()

    def state(self) -> dict:
        return {
            "epoch": self.epoch,
            "document": self.document,
            "pending": list(self.pending),
            "repeats": self.repeats,
            "last": self.last if self.repeats else None,
        }

    def micro_batch(self, sequences: int, seq_len: int) -> torch.Tensor:
        """The next int64 tokens [sequences, seq_len + 1]; chunks do not overlap."""
        if not self.repeats:
            length = seq_len + 1
            self.last = [self._take(length) for _ in range(sequences)]
            self.repeats = self.corpus.cfg.duplicate_workers
        self.repeats -= 1
        return torch.tensor(self.last)

    def _take(self, length: int) -> list[int]:
        while len(self.pending) < length:
            self.pending += next(self._documents)
        chunk, self.pending = self.pending[:length], self.pending[length:]
        return chunk

    def _tokenized(self) -> Iterator[list[int]]:
        """Token lists of documents, from the cursor on, for ever."""
        while True:
            documents = itertools.islice(self.corpus.documents(self.epoch), self.document, None)
            for tokens in self._in_background(documents):
                self.document += 1
                yield tokens
            if not self.document:
                raise UserError(f"data.path={self.corpus.cfg.path}: holds no documents to train on")
            self.epoch, self.document = self.epoch + 1, 0

    def _in_background(self, documents: Iterator[str]) -> Iterator[list[int]]:
        threads = self.corpus.cfg.tokenizer_threads
        pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        try:
            waiting: deque = deque()
            for group in _batched(documents):  # itertools.batched is of Python 3.12
                waiting.append(pool.submit(encode, self.tokenizer, group, self.separator))
                if len(waiting) > threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:  # without waiting: the garbage collector may end this generator in one of the pool's own threads
            pool.shutdown(wait=False, cancel_futures=True)


def _batched(items: Iterator[str]) -> Iterator[list[str]]:
    while group := list(itertools.islice(items, _TOKENIZE)):
        yield group


def encode(tokenizer, documents, separator: int) -> list[list[int]]:
    """Token ids of each document, led by one separator."""
    encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[separator, *ids] for ids in encoded["input_ids"]]


def heldout(cfg: DataConfig, tokenizer, wanted: int) -> tuple[torch.Tensor, str]:
    """About `wanted` tokens never trained on: (int64 tokens [sequences >= 1, HELDOUT_LENGTH + 1], their hash)."""
    length = HELDOUT_LENGTH + 1
    tokens: list[int] = []
    for document in corpus(cfg, seed=0).heldout():
        tokens += encode(tokenizer, [document], document_token(tokenizer))[0]
        if len(tokens) >= wanted + length:
            break
    sequences = min(max(1, wanted // HELDOUT_LENGTH), len(tokens) // length)
    if not sequences:
        raise UserError(
            f"data.path={cfg.path}: its held-out text has {len(tokens)} tokens, fewer than one sequence needs"
        )
    packed = torch.tensor(tokens[: sequences * length]).view(sequences, length)
    return packed, hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:12]
