"""Read the openings of the articles in a MediaWiki dump, without markup."""

from __future__ import annotations

import bz2
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell.nodes import Node, Tag, Wikilink

from qat.errors import UserError


def openings(dump: Path) -> Iterator[str]:
    """Yield the text of each article before its first heading, in the dump's order.

    The rest of an article is full of lists, tables and references. dump: XML, compressed by bzip2. Errors: UserError
    when it is no such file.
    """
    try:
        with bz2.open(dump) as file:
            for _, page in ElementTree.iterparse(file):
                if page.tag.endswith("}page"):
                    if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                        text = page.findtext("{*}revision/{*}text") or ""
                        yield plain(text.partition("\n==")[0])
                    page.clear()
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise UserError(f"{dump}: no MediaWiki dump as .xml.bz2 ({error}); give one, or a folder of .txt") from error


def plain(wikitext: str) -> str:
    """Return wikitext as plain text, without templates, tables, references, files and categories."""
    code = mwparserfromhell.parse(wikitext)
    for node in code.filter(matches=_is_not_prose):
        with contextlib.suppress(ValueError):  # it was inside a node already removed
            code.remove(node)
    # Pronunciations and names in other scripts are templates in parentheses, which are empty now.
    text = re.sub(r"(?<=\()[\s,;]+", "", code.strip_code())
    return text.replace(" ()", "").strip()


def _is_not_prose(node: Node) -> bool:
    if isinstance(node, Wikilink):
        return re.match(r"\s*(file|image|category)\s*:", str(node.title), re.IGNORECASE) is not None
    return isinstance(node, Tag) and node.tag in ("ref", "table")
