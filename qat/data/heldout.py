"""Cut held-out text, which is never trained on, into sequences; record the document of each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow
import pyarrow.ipc
import torch

from qat.config import DataConfig, ValidationConfig
from qat.data import wikipedia
from qat.data.packing import open_corpus
from qat.data.tokenize import encode
from qat.errors import UserError, nearest
from qat.models.tokenizer import document_token
from qat.utils.environment import source_path

HELDOUT_LENGTH = 128  # tokens a held-out sequence


class Heldout(NamedTuple):
    """Held-out text.

    tokens: int64 [sequences >= 1, HELDOUT_LENGTH + 1]. documents: int64 [sequences], the number of each sequence's
    document. hash: of the tokens.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    hash: str


def load_heldout(cfg: DataConfig, tokenizer, wanted: int) -> Heldout:
    """Return about `wanted` held-out tokens: the first sequence of each document, then the second of each, and so on.

    Many documents are better than few: neighbouring sequences of one document are correlated. Errors: UserError when
    every document is shorter than a sequence.
    """
    length, count = HELDOUT_LENGTH + 1, max(1, wanted // HELDOUT_LENGTH)
    separator = document_token(tokenizer)
    encoded = (encode(tokenizer, [document], separator)[0] for document in _documents(cfg))
    texts = list(itertools.islice((text for text in encoded if len(text) >= length), count))
    if not texts:
        raise UserError(f"{cfg.named}: no held-out document has the {length} tokens of a sequence; name another text")
    rows = [
        (text[start : start + length], number)
        for start in range(0, max(map(len, texts)), length)
        for number, text in enumerate(texts)
        if len(text) >= start + length
    ][:count]
    tokens, documents = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Heldout(tokens, documents, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12])


def _documents(cfg: DataConfig) -> Iterator[str]:
    """Yield the held-out documents in a fixed order; of a MediaWiki dump or an Arrow file these are all it has."""
    if cfg.source != "hub" and cfg.path.endswith(".bz2"):
        return wikipedia.openings(source_path(cfg.source, cfg.path))
    if isinstance(cfg, ValidationConfig) and cfg.path.endswith(".arrow"):
        return iter(_column(cfg))
    return open_corpus(cfg, seed=0).heldout()


def _column(cfg: ValidationConfig) -> list[str]:
    """Return the distinct texts of an Arrow file's column, in its order. Errors: UserError."""
    try:
        with source_path(cfg.source, cfg.path).open("rb") as file:
            table = pyarrow.ipc.open_stream(file).read_all()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(
            f"{cfg.named}: no .arrow file of `datasets` ({error}); give one, or a folder of .txt"
        ) from error
    if cfg.column not in table.column_names:
        raise UserError(f"validation.column={cfg.column}: not in {cfg.path}; {nearest(cfg.column, table.column_names)}")
    return list(dict.fromkeys(table[cfg.column].to_pylist()))
