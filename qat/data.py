"""Tokens -> packed sequences. Documents are separated by one token, concatenated, and cut into chunks.

The order of tokens depends on the seed and on nothing else, and a cursor of a few numbers restores it exactly.

    qat.corpus (documents in blocks) -> qat.tokens (-> qat.shards, a cache that runs share) -> packed sequences
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from qat import files, shards, wikipedia
from qat.config import DataConfig, UserError
from qat.corpus import Corpus, Files, Stream
from qat.models import document_token
from qat.runtime import package_path
from qat.tokens import Tokens, encode

HELDOUT_LENGTH = 128  # tokens a held-out sequence


def corpus(cfg: DataConfig, seed: int, state: dict | None = None) -> Corpus:
    """The documents to train on. state: of a stream that stays on the data set's revision it has begun with."""
    if cfg.source != "hub":
        return Files(cfg, seed)
    if cfg.cache:
        return shards.source(cfg, seed)
    return Stream(cfg, seed, (state or {}).get("of", {}).get("revision"))


class TokenStream:
    """An endless stream of packed training sequences with a cursor.

    state: that of its tokens, "repeats" and "last" (only with duplicate_workers > 1), JSON-able.
    """

    def __init__(self, tokens: Tokens | shards.CachedTokens, duplicates: int = 1, state: dict | None = None):
        """duplicates: every micro-batch occurs so often in a row."""
        self.tokens, self.duplicates = tokens, duplicates
        self.repeats, last = (state["repeats"], state["last"]) if state else (0, None)
        self.last = torch.tensor(last) if last else None

    @property
    def epoch(self) -> int:
        return self.tokens.epoch

    def state(self) -> dict:
        return self.tokens.state() | {"repeats": self.repeats, "last": self.last.tolist() if self.repeats else None}

    def micro_batch(self, sequences: int, seq_len: int) -> torch.Tensor:
        """The next int64 tokens [sequences, seq_len + 1]; chunks do not overlap."""
        if not self.repeats:
            length = seq_len + 1
            taken = [torch.as_tensor(self.tokens.take(length), dtype=torch.int64) for _ in range(sequences)]
            self.last = torch.stack(taken)
            self.repeats = self.duplicates
        self.repeats -= 1
        return self.last.clone()


def stream(cfg: DataConfig, seed: int, tokenizer, state: dict | None = None) -> TokenStream:
    """The training sequences of a run, from the beginning or from a cursor on. Errors: UserError."""
    kind = shards.CachedTokens if cfg.cache else Tokens
    return TokenStream(kind(corpus(cfg, seed, state), tokenizer, state), cfg.duplicate_workers, state)


class Heldout(NamedTuple):
    """Text never trained on. tokens: int64 [sequences >= 1, HELDOUT_LENGTH + 1]; documents: int64 [sequences], which
    one each is of; hash: of the tokens."""

    tokens: torch.Tensor
    documents: torch.Tensor
    hash: str


def heldout(cfg: DataConfig, tokenizer, wanted: int) -> Heldout:
    """About `wanted` held-out tokens of as many documents as possible, as neighbours say nothing new about the noise:
    the first sequence of each, then the second of each, and so on. Errors: UserError when no document has one."""
    length, count = HELDOUT_LENGTH + 1, max(1, wanted // HELDOUT_LENGTH)
    separator = document_token(tokenizer)
    encoded = (encode(tokenizer, [document], separator)[0] for document in _heldout(cfg))
    texts = list(itertools.islice((text for text in encoded if len(text) >= length), count))
    if not texts:
        raise UserError(f"{cfg.named}: no held-out document has the {length} tokens of a sequence; name another text")
    found = [
        (text[start : start + length], number)
        for start in range(0, max(map(len, texts)), length)
        for number, text in enumerate(texts)
        if len(text) >= start + length
    ][:count]
    tokens, documents = (torch.tensor(column) for column in zip(*found, strict=True))
    return Heldout(tokens, documents, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12])


def _heldout(cfg: DataConfig) -> Iterator[str]:
    """Documents never trained on, in a fixed order. A MediaWiki dump has no others."""
    if cfg.source != "hub" and cfg.path.endswith(".bz2"):
        return wikipedia.openings(package_path(cfg.path) if cfg.source == "package" else Path(files.expand(cfg.path)))
    return corpus(cfg, seed=0).heldout()
