"""Turn a page of an HTML manual, as Sphinx and DocBook write them, into plain prose."""

from __future__ import annotations

import re

from lxml import html

# Left out: code, tables, lists of contents, marks beside headings.
_DROPPED_TAGS = {"script", "style", "pre", "table", "nav", "svg", "form"}
_DROPPED_CLASSES = {"toc", "toctree-wrapper", "contents", "headerlink", "indexterm", "navheader", "navfooter"}
_BLOCKS = ("p", "li", "dt", "dd", "div", "section", "blockquote", "br", *(f"h{level}" for level in range(1, 7)))
_BREAK = "\u2029"  # Unicode's paragraph separator, which no page has

# A paragraph is prose if it has at least so many parts, and this share of them look like words.
_SENTENCE = 8
_LEAST_WORDS = 0.7
_WORD = re.compile(r"[(\"'“‘]*[A-Za-z][a-z’'-]*[.,;:!?)\"'”’]*")
_LEAST_PROSE = 0.5  # a page is prose if this share of its characters is in such paragraphs


def document(page: bytes) -> str:
    """Return the paragraphs of a page in UTF-8, separated by blank lines; "" for a page that is mostly not prose."""
    text = "\n\n".join(paragraphs(page))
    return text if prose_size(text) >= _LEAST_PROSE * len(text) else ""


def paragraphs(page: bytes) -> list[str]:
    """Return headings, paragraphs and list items, one line each, without code, tables and navigation."""
    root = html.document_fromstring(page, parser=html.HTMLParser(encoding="utf-8"))
    body = next(iter(root.xpath("//*[@role='main']")), root.body)  # of Sphinx, else the whole page
    for element in list(body.iter(html.etree.Element)):
        if element.tag in _DROPPED_TAGS or not _DROPPED_CLASSES.isdisjoint(element.classes):
            element.drop_tree()
    for element in body.iter(_BLOCKS):
        element.text = _BREAK + (element.text or "")
        element.tail = _BREAK + (element.tail or "")
    lines = (" ".join(line.split()) for line in body.text_content().split(_BREAK))
    return [line for line in lines if line]


def prose_size(document: str) -> int:
    """Return how many characters of a document are in sentences, not in headings, signatures or data."""
    return sum(len(paragraph) for paragraph in document.split("\n\n") if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    return len(words) >= _SENTENCE and sum(map(bool, map(_WORD.fullmatch, words))) >= _LEAST_WORDS * len(words)
