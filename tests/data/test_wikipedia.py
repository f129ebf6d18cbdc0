"""Prose out of a MediaWiki dump, and nothing else of it."""

from __future__ import annotations

import bz2

import pytest

from qat.config import DataConfig, ValidationConfig
from qat.data import heldout, wikipedia
from qat.errors import UserError
from qat.models.tokenizer import byte_tokenizer
from qat.utils import environment
from tests.conftest import composed

WIKITEXT = """{{Infobox|name=Ada<ref>{{cite|Me}}</ref>}}
[[File:Ada.jpg|thumb|A ''portrait''<ref name="a" /> of [[Ada]]]]
{| class="wikitable"
| a table<ref>inside</ref>
|}
'''Ada''' ({{IPA|ˈeɪdə}}; born 1815) was a [[mathematics|mathematician]]<ref>A book.</ref> ({{lang|fr|x}}) of&nbsp;note.
[[Category:People]]"""


def page(title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    return f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}<revision><text>{text}</text></revision></page>"


@pytest.fixture
def dump(tmp_path):
    escaped = WIKITEXT.replace("&", "&amp;").replace("<", "&lt;")
    pages = [page("Ada", f"{escaped}\n== Life ==\nLong."), page("Talk:Ada", "Hello", namespace=1)]
    pages += [
        page("Lovelace", "#REDIRECT [[Ada]]", redirect='<redirect title="Ada" />'),
        page("Bee", "A '''bee''' flies."),
    ]
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="http://a/">{"".join(pages)}</mediawiki>'.encode()))
    return path


def test_markup_goes_and_prose_stays():
    assert wikipedia.plain(WIKITEXT) == "Ada (born 1815) was a mathematician of\xa0note."
    assert wikipedia.plain("It has (two) words, and [http://a.b a link].") == "It has (two) words, and a link."


def test_articles_are_read_up_to_their_first_heading_and_nothing_else_is(dump):
    assert list(wikipedia.openings(dump)) == ["Ada (born 1815) was a mathematician of\xa0note.", "A bee flies."]


def test_what_is_no_dump_is_said_in_one_line(dump, tmp_path):
    cut, other = tmp_path / "cut.xml.bz2", tmp_path / "other.xml.bz2"
    cut.write_bytes(dump.read_bytes()[:-20])
    other.write_bytes(bz2.compress(b"no XML"))
    for path in (cut, other, tmp_path / "none.xml.bz2"):
        with pytest.raises(UserError, match=r"no MediaWiki dump as \.xml\.bz2") as caught:
            list(wikipedia.openings(path))
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    few = DataConfig(name="t", source="files", path=str(dump))
    with pytest.raises(UserError, match="no held-out document has the 129 tokens of a sequence; name another text"):
        heldout.load_heldout(few, byte_tokenizer(), 128)


def test_the_packaged_articles_are_there_and_clean():
    found = list(wikipedia.openings(environment.package_path(composed().validation.path)))
    assert len(found) == 106 and 130_000 < sum(map(len, found)) < 150_000
    assert found[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    assert not [mark for text in found for mark in ("[[", "]]", "{{", "}}", "{|", "<ref", "''", "==") if mark in text]


def test_every_sequence_begins_an_article_of_its_own():
    cfg, tokenizer = ValidationConfig(**composed().validation), byte_tokenizer()
    tokens, documents, text_hash = heldout.load_heldout(cfg, tokenizer, 1024)
    openings = [text for text in wikipedia.openings(environment.package_path(cfg.path)) if len(text.encode()) >= 128]
    assert tokens.shape == (8, 129) and (tokens[:, 0] == 256).all()
    for sequence, opening in zip(tokens.tolist(), openings, strict=False):
        assert opening.encode().startswith(
            tokenizer.decode(sequence[1:], errors="ignore").encode().rstrip(b"\xef\xbf\xbd")
        )
    assert heldout.load_heldout(cfg, tokenizer, 1)[0].shape == (1, 129)
    assert (
        heldout.load_heldout(cfg, tokenizer, 1024).hash == text_hash != heldout.load_heldout(cfg, tokenizer, 512).hash
    )
    assert documents.tolist() == list(range(8))
    assert 90 < len(heldout.load_heldout(cfg, tokenizer, 10**9).documents.unique()) <= 106
