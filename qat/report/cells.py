"""Cells and tables that a page and a Markdown file both render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qat.report.text import escape, markdown


@dataclass(frozen=True)
class Cell:
    """Text, the mark it earns, and an aside in small print below it."""

    text: str
    aside: str = ""
    mark: str = ""
    strong: bool = False

    def __str__(self) -> str:
        text = " ".join(filter(None, (escape(self.text), self.mark)))
        text = f"**{text}**" if self.strong else text
        aside = f"<small>{escape(self.aside)}</small>".replace("\n", "<br>") if self.aside else ""
        return "<br>".join(filter(None, (text, aside)))


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        return markdown(self.header, [[str(cell).replace("|", "\\|") for cell in row] for row in self.rows])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of plain text."""
    return Table(header, [[Cell(text) for text in row] for row in rows])
