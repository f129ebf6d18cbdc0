"""Reads a page of HTML."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

VOID = {"br", "hr", "img", "meta"}


class Page(HTMLParser):
    """Read what matters of a page: text, headings, tables, images, links, and whether every element is closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.open, self.tags, self.words = path.read_text(), [], Counter(), []
        self.ids, self.links, self.images, self.tables, self.headings = [], [], {}, [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags[tag] += 1
        self.open += [] if tag in VOID else [tag]
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        if tag == "img":
            self.images.setdefault(found["alt"], []).append(found["src"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] = f"{self.tables[-1][-1][-1]} {data}".strip()
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the first table whose header begins so."""
        return next(rows[1:] for rows in self.tables if tuple(rows[0][: len(header)]) == header)
