"""Sources of text: documents in an order that depends on the seed, from any place on."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from qat.config import DataConfig
from qat.data import manuals, tokenize
from qat.errors import UserError
from qat.utils.environment import source_path

PASSAGE = 4000  # characters: texts are cut into documents of about the length of a web page
HELDOUT_EVERY = 20  # one file in so many is never trained on

Place = tuple[int, int, int]  # of a document: epoch, block (shards before it in the epoch), number in the block


class Corpus:
    """Documents in a seeded order, and held-out documents that are not among them.

    A block is a part of an epoch whose documents are shuffled together. It can be read without the blocks before it.
    """

    facts: dict  # identifies this text and the rule of its order; JSON-able

    def __init__(self, cfg: DataConfig, seed: int):
        self.cfg, self.seed = cfg, seed

    def documents(self, tokenizer, place: Place = (0, 0, 0)) -> Iterator[tuple[Place, Sequence[int]]]:
        """Yield (place, tokens) of each document from a place on, without end. An epoch has every document once.

        Errors: UserError.
        """
        epoch, *start = place
        while True:
            empty = True
            for block, number, tokens in self._epoch(tokenizer, epoch, *start):
                empty = False
                yield (epoch, block, number), tokens
            if empty:
                raise UserError(f"{self.cfg.named}: holds no documents to train on")
            epoch, start = epoch + 1, (0, 0)

    def _epoch(self, tokenizer, epoch: int, block: int, number: int) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Yield (block, number, tokens) of an epoch's documents from a block and number on."""
        raise NotImplementedError

    def heldout(self) -> Iterator[str]:
        """Yield the held-out documents in a fixed order."""
        raise NotImplementedError

    def _shuffle(self, items: list, *place: int) -> None:
        random.Random("/".join(map(str, (self.seed, *place)))).shuffle(items)


class TextFiles(Corpus):
    """The .txt files in a folder and its subfolders. An epoch is one block of passages.

    Whole files are held out, not passages, so that no held-out text is next to text that was trained on.
    """

    def __init__(self, cfg: DataConfig, seed: int):
        super().__init__(cfg, seed)
        folder = manuals.folder(cfg) if cfg.source == "prepared" else source_path(cfg.source, cfg.path)
        texts = sorted(f for f in folder.rglob("*") if f.suffix.lower() == ".txt" and not f.is_dir())
        texts = [f for f in texts if f.stat().st_size]
        if len(texts) < 2:
            raise UserError(f"{cfg.named}: needs a folder with at least two .txt files, found {len(texts)}")
        self.held_out = texts[::HELDOUT_EVERY]
        self.trained = [f for number, f in enumerate(texts) if number % HELDOUT_EVERY]
        self.facts = {"order": 1, "revision": inventory(folder, texts)}

    def _epoch(self, tokenizer, epoch: int, block: int, number: int) -> Iterator[tuple[int, int, Sequence[int]]]:
        passages = [passage for file in self.trained for passage in self._passages(file)]
        self._shuffle(passages, epoch)
        encoded = tokenize.encode_all(tokenizer, passages[number:], self.cfg.tokenizer_threads)
        yield from ((0, position, tokens) for position, tokens in enumerate(encoded, number))

    def heldout(self) -> Iterator[str]:
        # One passage of each file in turn, so that even a short measurement sees every held-out file.
        columns = itertools.zip_longest(*map(self._passages, self.held_out))
        return (passage for row in columns for passage in row if passage is not None)

    def _passages(self, file: Path) -> list[str]:
        """Cut a text at paragraph ends into pieces of about PASSAGE characters."""
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.cfg.named}: {file.name} is not text in UTF-8 ({error}); convert or remove it"
            ) from error
        passages, size = [[]], 0
        for paragraph in text.split("\n\n"):
            if size >= PASSAGE:
                passages.append([])
                size = 0
            passages[-1].append(paragraph.strip())
            size += len(paragraph)
        return ["\n\n".join(p) for p in passages if any(p)]


def inventory(folder: Path, files: list[Path]) -> str:
    """Return a hash of the names and sizes of files."""
    lines = [f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
