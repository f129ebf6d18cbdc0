"""The README says what its record says, and what it names exists."""

from __future__ import annotations

import re

import pytest

from qat.report.experiment import published
from qat.utils.environment import ROOT
from scripts.docs import PAGES, written


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("README.md", "Held-out loss, nats"),
        ("experiments/README.md", "not decidable at this scale |"),
        ("experiments/exp1/README.md", "| pretrained checkpoint "),
        ("experiments/exp2/README.md", "| exp2 most_recent |"),
        ("experiments/exp8/README.md", "| W8A8 by PTQ "),
    ],
)
def test_what_is_shown_of_a_record_is_the_records(page, number):
    text = (ROOT / page).read_text()
    assert number in text and written(page, text) == text
    assert written(page, text.replace(number, "typed by hand")) == text


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_stale(page):
    text = (ROOT / page).read_text()
    assert written(page, text) == text


def test_an_experiment_asks_one_question_everywhere():
    for name, entry in published()["experiments"].items():
        row = f"| [{name}]({name}/README.md) | {entry['question']} |"
        assert row in (ROOT / "experiments" / "README.md").read_text()
        assert f"# {entry['question']}" in (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()


def test_what_the_readme_points_to_exists():
    for page in PAGES:
        folder = (ROOT / page).parent
        links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
        assert links and not [link for link in links if not (folder / link).exists()]


def test_the_commands_of_the_pages_are_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= {f"exp{i}" for i in [*range(1, 10), "N"]}  # 9 is the one that CONTRIBUTING.md adds
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "experiments").rglob("README.md")]
    named = {page: set(re.findall(r"make ([a-z]+[0-9N]?)", page.read_text())) for page in pages}
    assert all(named[page] for page in pages[:2])
    assert {page: found - targets for page, found in named.items() if found - targets} == {}
