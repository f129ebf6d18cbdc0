"""Pack tokens into sequences: join documents, each after one separator token, and cut them to length.

    sources, streaming (documents in a seeded order) -> tokenize (-> token_cache) -> sequences -> micro-batches

The order of tokens depends only on the seed, and a cursor of a few numbers restores it exactly.
"""

from __future__ import annotations

import numpy
import torch

from qat.config import DataConfig
from qat.data.sources import Corpus, TextFiles
from qat.data.streaming import ParquetFiles
from qat.errors import UserError


def open_corpus(cfg: DataConfig, seed: int, state: dict | None = None) -> Corpus:
    """Return the documents to train on. state: cursor of a run, which stays on the revision that it began with."""
    if cfg.source != "hub":
        return TextFiles(cfg, seed)
    return ParquetFiles(cfg, seed, (state or {}).get("corpus", {}).get("revision"))


class TokenStream:
    """An endless stream of packed training sequences.

    duplicates: how often every micro-batch occurs in a row.
    state: a cursor, JSON-able: {"corpus": `Corpus.facts`, "epoch", "block", "document", "token": where the next
        micro-batch begins, "repeats": how many duplicates of the last one are still to come}.
    """

    def __init__(self, corpus: Corpus, tokenizer, duplicates: int = 1, state: dict | None = None):
        self.corpus, self.duplicates = corpus, duplicates
        if state:
            _check(state, corpus)
        start = state or {"epoch": 0, "block": 0, "document": 0, "token": 0, "repeats": 0}
        self.place = (start["epoch"], start["block"], start["document"])
        self.token, self.repeats = start["token"], start["repeats"]
        self.documents = corpus.documents(tokenizer, self.place)
        self.tokens = None  # of the document at `place`
        self.batch_start = None  # place and token at which the last micro-batch began

    @property
    def epoch(self) -> int:
        return self.place[0]

    def state(self) -> dict:
        """Return the cursor of the next micro-batch."""
        repeating = self.repeats and self.batch_start
        (epoch, block, document), token = self.batch_start if repeating else (self.place, self.token)
        cursor = {"epoch": epoch, "block": block, "document": document, "token": token, "repeats": self.repeats}
        return {"corpus": self.corpus.facts, **cursor}

    def micro_batch(self, sequences: int, seq_len: int) -> torch.Tensor:
        """Return the next int64 tokens [sequences, seq_len + 1]; sequences do not overlap."""
        if not self.repeats or self.batch_start is None:  # a resume between duplicates reads the same tokens again
            self.batch_start = self.place, self.token
            self.last = torch.from_numpy(self._take(sequences * (seq_len + 1))).view(sequences, seq_len + 1)
            self.repeats = self.repeats or self.duplicates
        self.repeats -= 1
        return self.last.clone()

    def _take(self, count: int) -> numpy.ndarray:
        taken, done = numpy.empty(count, numpy.int64), 0
        if self.tokens is None:
            self.place, self.tokens = next(self.documents)
        while done < count:
            if self.token == len(self.tokens):
                (self.place, self.tokens), self.token = next(self.documents), 0
            piece = self.tokens[self.token : self.token + count - done]
            taken[done : done + len(piece)] = piece
            self.token, done = self.token + len(piece), done + len(piece)
        return taken


def _check(state: dict, corpus: Corpus) -> None:
    """Raise `UserError` when a cursor belongs to another text or order."""
    then, now = state["corpus"], corpus.facts
    if then != now:
        then, now = (", ".join(map(str, facts.values())) for facts in (then, now))
        raise UserError(
            f"{corpus.cfg.named}: the text or its order has changed since the checkpoint ({then}; now {now}); bring it "
            f"back, or delete the run folder to train it anew"
        )


def training_stream(cfg: DataConfig, seed: int, tokenizer, state: dict | None = None) -> TokenStream:
    """Return the training sequences of a run, from the beginning or from the cursor `state`. Errors: UserError."""
    return TokenStream(open_corpus(cfg, seed, state), tokenizer, cfg.duplicate_workers, state)
