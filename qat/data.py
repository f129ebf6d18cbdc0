"""Tokens -> packed sequences. Documents are separated by one token, concatenated, and cut into chunks.

The order of tokens depends on the seed and on nothing else, and a cursor of a few numbers restores it exactly.

    qat.corpus (documents in blocks) -> qat.tokens (-> qat.shards, a cache that runs share) -> packed sequences
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from qat import shards, wikipedia
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


def heldout(cfg: DataConfig, tokenizer, wanted: int) -> tuple[torch.Tensor, str]:
    """About `wanted` tokens never trained on: (int64 tokens [sequences >= 1, HELDOUT_LENGTH + 1], their hash)."""
    length = HELDOUT_LENGTH + 1
    tokens: list[int] = []
    for document in _heldout(cfg):
        tokens += encode(tokenizer, [document], document_token(tokenizer))[0]
        if len(tokens) >= wanted + length:
            break
    sequences = min(max(1, wanted // HELDOUT_LENGTH), len(tokens) // length)
    if not sequences:
        raise UserError(
            f"data.path={cfg.path}: its held-out text has {len(tokens)} tokens, fewer than one sequence needs"
        )
    packed = torch.tensor(tokens[: sequences * length]).view(sequences, length)
    return packed, _hash(packed)


def beginnings(cfg: DataConfig, tokenizer, wanted: int) -> tuple[torch.Tensor, str]:
    """As `heldout`, but every sequence begins a document of its own: a few tokens see as much of a text as they can."""
    length, separator = HELDOUT_LENGTH + 1, document_token(tokenizer)
    encoded = (encode(tokenizer, [document], separator)[0] for document in _heldout(cfg))
    found = list(itertools.islice((t[:length] for t in encoded if len(t) >= length), max(1, wanted // HELDOUT_LENGTH)))
    if not found:
        raise UserError(f"{cfg.path}: no held-out document has the {length} tokens of a sequence; name another text")
    return torch.tensor(found), _hash(torch.tensor(found))


def _heldout(cfg: DataConfig) -> Iterator[str]:
    """Documents never trained on, in a fixed order. A MediaWiki dump has no others."""
    if cfg.source != "hub" and cfg.path.endswith(".bz2"):
        return wikipedia.openings(package_path(cfg.path) if cfg.source == "package" else Path(cfg.path))
    return corpus(cfg, seed=0).heldout()


def _hash(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
