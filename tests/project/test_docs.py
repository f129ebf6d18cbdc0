"""The pages say what their sources say, and what they name exists."""

from __future__ import annotations

import re

import pytest

from qat.report.experiment import published
from qat.utils.environment import ROOT
from scripts.docs import PAGES, written

TEXTS = {page: (ROOT / page).read_text() for page in PAGES}


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("README.md", "Necessary: the max window "),
        ("experiments/README.md", "W8A8 by PTQ "),
        ("experiments/README.md", "not decidable at this scale |"),
        ("docs/configuration.md", "exp_smooth: weight of the newest amax"),
        ("docs/configuration.md", "`openpangu_1b_random`"),
        ("docs/performance.md", "step: mlp : bf16"),
    ],
)
def test_a_section_is_written_from_its_source(page, number):
    text = TEXTS[page]
    assert number in text and written(text) == text
    assert written(text.replace(number, "typed by hand")) == text


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_stale(page):
    assert written(TEXTS[page]) == TEXTS[page]


def test_an_experiment_asks_one_question_everywhere():
    for name, entry in published()["experiments"].items():
        assert f"# {entry['question']}" in (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
        page = TEXTS["experiments/README.md"]
        assert re.search(rf"^\| {name} \| {re.escape(entry['question'])} +\|", page, re.MULTILINE)


def test_the_readme_is_read_in_minutes():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_links_lead_somewhere():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in headings(target.read_text()), f"{page}: {link}"


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_named_files_exist():
    for page, text in TEXTS.items():
        named = re.findall(r"(?<![\w/.])((?:qat|scripts|tests|conf|experiments)/[\w/.\-]*\w)", text)
        absent = [name for name in named if not list(ROOT.glob(name)) and not re.search("exp9|int6|mine", name)]
        assert absent == [], page  # exp9 and int6 are what a reader adds, `mine` is his own record


def test_named_commands_are_targets():
    targets = (
        {"exp9"}
        | set(re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        | set(published()["experiments"])
    )
    command = re.compile(r"(?:`|^ {4})(?:[A-Z0-9_]+=\S+ )*make ([a-z_]+[0-9]?)", re.MULTILINE)
    named = {page: set(command.findall(text)) for page, text in TEXTS.items()}
    assert {"exp8", "test"} < named["README.md"]
    assert {page: found - targets for page, found in named.items() if found - targets} == {}
