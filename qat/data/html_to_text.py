"""Turn a page of an HTML manual, as Sphinx and DocBook write them, into prose."""

from __future__ import annotations

import re

from lxml import html

# What is not read aloud: code, tables, lists of contents, marks beside headings.
_UNREAD_TAGS = {"script", "style", "pre", "table", "nav", "svg", "form"}
_UNREAD_CLASSES = {"toc", "toctree-wrapper", "contents", "headerlink", "indexterm", "navheader", "navfooter"}
_BLOCKS = ("p", "li", "dt", "dd", "div", "section", "blockquote", "br", *(f"h{level}" for level in range(1, 7)))
_BREAK = "\u2029"  # Unicode's paragraph separator, which no page has

_SENTENCE = 8  # words: anything shorter is a heading, a name or a signature
_WORD = re.compile(r"[(\"'“‘]*[A-Za-z][a-z’'-]*[.,;:!?)\"'”’]*")
_LEAST_WORDS = 0.7  # of a paragraph: the share that are words of a language
_LEAST_PROSE = 0.5  # of a page: the share of its characters that are in such paragraphs


def document(page: bytes) -> str:
    """Return the paragraphs of a page in UTF-8, blank lines between them; nothing for a page that is mostly no prose,
    such as an index or a list of names."""
    text = "\n\n".join(paragraphs(page))
    return text if prose_size(text) >= _LEAST_PROSE * len(text) else ""


def paragraphs(page: bytes) -> list[str]:
    """Return headings, paragraphs and items of lists, one line each, without code, tables and navigation."""
    root = html.document_fromstring(page, parser=html.HTMLParser(encoding="utf-8"))
    body = next(iter(root.xpath("//*[@role='main']")), root.body)  # Sphinx's, else the whole
    for element in list(body.iter(html.etree.Element)):
        if element.tag in _UNREAD_TAGS or not _UNREAD_CLASSES.isdisjoint(element.classes):
            element.drop_tree()
    for element in body.iter(_BLOCKS):
        element.text = _BREAK + (element.text or "")
        element.tail = _BREAK + (element.tail or "")
    lines = (" ".join(line.split()) for line in body.text_content().split(_BREAK))
    return [line for line in lines if line]


def prose_size(document: str) -> int:
    """Return how many of a document's characters are in sentences, not in headings, signatures or data."""
    return sum(len(paragraph) for paragraph in document.split("\n\n") if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    return len(words) >= _SENTENCE and sum(map(bool, map(_WORD.fullmatch, words))) >= _LEAST_WORDS * len(words)
