"""Documents -> tokens, tokenized in background threads whose results are taken in order: every token exactly once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from qat.data.sources import Corpus
from qat.errors import UserError
from qat.models.tokenizer import document_token

_GROUP = 64  # documents a background task
_Place = TypeVar("_Place")


class Tokens:
    """The tokens of a corpus without end, each document led by one separator.

    state: {"order", "of" (see `Corpus`), "epoch", "block", "document" (taken in this block), "pending" (tokens of these
    documents that are still to come), "taken" (tokens of this block that are gone), "skip" (tokens after all these
    that are gone too: set by `qat.data.token_cache`, which does not know documents)}, JSON-able.
    """

    def __init__(self, corpus: Corpus, tokenizer, state: dict | None = None):
        self.corpus, self.tokenizer = corpus, tokenizer
        if state:
            check(state, corpus, corpus.of)
        state = {"epoch": 0, "block": 0, "document": 0, "pending": [], "taken": 0, "skip": 0} | (state or {})
        self.epoch, self.block, self.document = state["epoch"], state["block"], state["document"]
        self.pending = list(state["pending"])
        self._read = state["taken"] - state["skip"] + len(self.pending)  # tokens of this block until now
        self._documents = self._tokenized()
        self.take(state["skip"])

    def state(self) -> dict:
        return {
            "order": self.corpus.order,
            "of": self.corpus.of,
            "epoch": self.epoch,
            "block": self.block,
            "document": self.document,
            "pending": list(self.pending),
            "taken": self._read - len(self.pending),
            "skip": 0,
        }

    def take(self, count: int) -> list[int]:
        """The next `count` tokens."""
        while len(self.pending) < count:
            (epoch, block, self.document), tokens = next(self._documents)
            if (epoch, block) != (self.epoch, self.block):
                self.epoch, self.block, self._read = epoch, block, 0
            self._read += len(tokens)
            self.pending += tokens
        taken, self.pending = self.pending[:count], self.pending[count:]
        return taken

    def _tokenized(self) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
        """((epoch, block, documents of it until now), tokens) of each document from the cursor on."""
        threads = self.corpus.cfg.tokenizer_threads
        for (epoch, block, start), group in in_background(self._groups(), self.tokenizer, threads):
            for number, tokens in enumerate(group, start + 1):
                yield (epoch, block, number), tokens

    def _groups(self) -> Iterator[tuple[tuple[int, int, int], list[str]]]:
        skip = self.document
        for block in self.corpus.blocks(self.epoch, self.block):
            for start, group in in_groups(block.documents, skip):
                yield (block.epoch, block.first, start), group
            skip = 0


def check(state: dict, corpus: Corpus, of: dict) -> None:
    """Refuse a cursor into another text than `of`. Errors: UserError."""
    # Cursors of the first version do not say what they are of; only files are still read in its order.
    if state.get("order", 1) != corpus.order or state.get("of", of) != of:
        then, now = (", ".join(map(str, each.values())) for each in (state.get("of", {"": "unknown"}), of))
        raise UserError(
            f"data.path={corpus.cfg.path}: the text or its order has changed since the checkpoint ({then}; now {now}); "
            f"bring it back, or delete the run folder to train it anew"
        )


def encode(tokenizer, documents: Iterable[str], separator: int) -> list[list[int]]:
    """Token ids of each document, led by one separator. Errors: UserError for text that the tokenizer refuses."""
    try:
        encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"the tokenizer fails on a document ({reason}); change the text, or the model") from error
    return [[separator, *ids] for ids in encoded["input_ids"]]


def in_groups(documents: list[str], start: int = 0) -> Iterator[tuple[int, list[str]]]:
    """What background tasks work on: (place of the first, documents), from a place on."""
    for first in range(start, len(documents), _GROUP):
        yield first, documents[first : first + _GROUP]


def in_background(
    groups: Iterable[tuple[_Place, list[str]]], tokenizer, threads: int
) -> Iterator[tuple[_Place, list[list[int]]]]:
    """(place, documents) -> (place, tokens of each), in the order they came in."""
    separator = document_token(tokenizer)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
    waiting: deque[tuple[_Place, Future]] = deque()
    try:
        for place, documents in groups:
            waiting.append((place, pool.submit(encode, tokenizer, documents, separator)))
            if len(waiting) > threads:
                done, tokens = waiting.popleft()
                yield done, tokens.result()
        for done, tokens in waiting:
            yield done, tokens.result()
    finally:  # without waiting: the garbage collector may end this generator in one of the pool's own threads
        pool.shutdown(wait=False, cancel_futures=True)
