"""Write the marked sections of README.md and experiments/, so that no number in them is typed by hand.

python scripts/docs.py            --check: only say whether they are up to date
"""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.report import studies, tables
from qat.runs import archive
from qat.utils.environment import ROOT

_SECTION = re.compile(r"(<!-- from (\S+): written by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)


def results(record: Path) -> str:
    """Of a record's report: settings, the table "At a glance", the verdict."""
    report = (record / "report.md").read_text()
    verdict = re.search(r"^>.*?\n\n", report, re.DOTALL | re.MULTILINE)[0].strip()
    about = [
        f"{_command(report, 'suite')}: {_facts(report)['Length']}.",
        "Held-out loss and points: the quantized run in W8A8 minus its BF16 baseline, with 95 % intervals. PTQ: that",
        "baseline in W8A8 without QAT, minus itself in BF16; pretrained: the checkpoint before any training, minus the",
        "same.",
    ]
    if "; " in _facts(report)["Seed"]:
        about.append(
            "Of several seeds: the mean; intervals are about further seeds and further text or questions at once."
        )
    return "\n".join(about) + f"\n\n{_table(report, 'At a glance')}\n\n{verdict}\n"


def claims(record: Path) -> str:
    """The verdicts of a record's factorial and audit, a claim a row, and what each rests on."""
    parts = []
    for name, study in studies.results(record).items():
        about = "; ".join(study["facts"][key] for key in ("Model", "Budget", "Benchmark", "Runs", "Hardware"))
        link = f"[all of it]({(record / name / f'{name}.md').relative_to(ROOT / 'experiments')})"
        parts += [f"`make {name}` ({about}; {link}):", studies.claims_table(study["claims"]).markdown()]
    return "\n\n".join(parts) + "\n"


def disagreements(paper: Path) -> str:
    """Where the paper's text and its released code part, with the switch for each."""
    return tables.disagreements(yaml.safe_load(paper.read_text())).markdown() + "\n"


def experiment(name: str, record: Path) -> str:
    """Of a record's report: what it says of one experiment, and links to the runs it rests on."""
    report = (record / "report.md").read_text()
    section = re.search(rf"^## {name}: .*?\n(.*?)(?=^## )", report, re.DOTALL | re.MULTILINE)[1].strip()
    asked, detail = re.match(r"(.*?\n\nPaper: .*?)\n\n(.*)", section, re.DOTALL).groups()
    rows = [_rows(_table(report, title), name) for title in ("At a glance", "Beside the paper")]
    if not any(rows):  # of BF16 runs only
        rows = ["All BF16 runs of the suite:\n\n" + _table(report, "BF16 baselines and the pretrained checkpoint")]
    above = Path("..") / record.relative_to(ROOT / "experiments")
    source = (
        f"The [record of the suite]({above / 'report.md'}) explains the columns. Its code: {_facts(report)['Code']}."
    )
    runs = [row["run"] for row in archive.table(record) if row["run"] in detail + rows[0]]
    named = f"The runs named here, in [a table of all]({above / 'runs.csv'}):"
    links = "\n".join(f"- {run}" for run in runs)
    return "\n\n".join([asked, f"{_command(report, name)}.\n{source}", *rows, detail, named, links]) + "\n"


def _facts(report: str) -> dict[str, str]:
    return dict(re.findall(r"^- (\w+): (.+)$", report, re.MULTILINE))


def _command(report: str, target: str) -> str:
    """What was run, on what."""
    facts = _facts(report)
    words = f"BUDGET={facts['Budget']}, PROTOCOL={facts['Protocol']}, SEEDS={facts['Seed'].replace('; ', ',')}"
    made = f"benchmark `{facts['Benchmark']}`, on {facts['Hardware']}, in {facts['Arithmetic']} arithmetic"
    return f"`make {target}` at {words},\n{made}"


def _table(report: str, title: str) -> str:
    """The first table under a heading."""
    return re.search(rf"^## {title}\n.*?\n(\|.*?)\n\n", report, re.DOTALL | re.MULTILINE)[1]


def _rows(table: str, name: str) -> str:
    """A table's header and the rows of an experiment; those whose first cell is empty continue the one above."""
    *header, first = table.split("\n", 2)
    found, own = [], False
    for line in first.split("\n"):
        label = line.split("|")[1].strip()
        own = label.partition(" ")[0] == name if label else own
        found += [line] if own else []
    return "\n".join([*header, *found]) if found else ""


PAGES = {"README.md": results, "experiments/README.md": claims} | {
    str(page.relative_to(ROOT)): functools.partial(experiment, page.parent.name)
    for page in sorted((ROOT / "experiments").glob("exp*/README.md"))
}


def written(page: str, text: str) -> str:
    """A page with each section as its source has it, a record or paper.yaml. Errors: SystemExit where it has none."""
    if not _SECTION.search(text):
        sys.exit(f"error: {page} has no section that `make docs` writes; see scripts/docs.py")

    def section(found: re.Match) -> str:
        write: Callable[[Path], str] = disagreements if found[2].endswith(".yaml") else PAGES[page]
        return found[1] + write(ROOT / found[2]) + found[3]

    return _SECTION.sub(section, text)


def main() -> None:
    for page in PAGES:
        now = (ROOT / page).read_text()
        if "--check" not in sys.argv:
            (ROOT / page).write_text(written(page, now))
        elif written(page, now) != now:
            sys.exit(f"error: {page} differs from its sources; run `make docs`")


if __name__ == "__main__":
    main()
