"""Tokens -> packed sequences. Documents are separated by one token, concatenated, and cut into chunks.

The order of tokens depends on the seed and on nothing else, and a cursor of a few numbers restores it exactly.

    qat.data.sources (documents in blocks) -> qat.data.tokenize (-> qat.data.token_cache, a cache that runs share) ->
    packed sequences
"""

from __future__ import annotations

import torch

from qat.config import DataConfig
from qat.data import token_cache
from qat.data.sources import Corpus, Files, Stream
from qat.data.tokenize import Tokens


def open_corpus(cfg: DataConfig, seed: int, state: dict | None = None) -> Corpus:
    """The documents to train on. state: of a stream that stays on the data set's revision it has begun with."""
    if cfg.source != "hub":
        return Files(cfg, seed)
    if cfg.cache:
        return token_cache.source(cfg, seed)
    return Stream(cfg, seed, (state or {}).get("of", {}).get("revision"))


class TokenStream:
    """An endless stream of packed training sequences with a cursor.

    state: that of its tokens, "repeats" and "last" (only with duplicate_workers > 1), JSON-able.
    """

    def __init__(self, tokens: Tokens | token_cache.CachedTokens, duplicates: int = 1, state: dict | None = None):
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


def training_stream(cfg: DataConfig, seed: int, tokenizer, state: dict | None = None) -> TokenStream:
    """The training sequences of a run, from the beginning or from a cursor on. Errors: UserError."""
    kind = token_cache.CachedTokens if cfg.cache else Tokens
    return TokenStream(kind(open_corpus(cfg, seed, state), tokenizer, state), cfg.duplicate_workers, state)
