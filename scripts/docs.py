"""Write what README.md and experiments/README.md show of their records, so that no number there is typed by hand.

python scripts/docs.py            --check: only say whether they are up to date
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.report import studies
from qat.runtime import ROOT

_SECTION = re.compile(r"(<!-- from (\S+): written by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)


def results(record: Path) -> str:
    """Of a record's report: settings, the table "At a glance", the verdict."""
    report = (record / "report.md").read_text()
    facts = dict(re.findall(r"^- (\w+): (.+)$", report, re.MULTILINE))
    table = re.search(r"^## At a glance\n.*?\n(\|.*?)\n\n", report, re.DOTALL | re.MULTILINE)[1]
    verdict = re.search(r"^>.*?\n\n", report, re.DOTALL | re.MULTILINE)[0]
    seeds = facts["Seed"].replace("; ", ",")
    lines = [
        f"`make suite` at BUDGET={facts['Budget']}, PROTOCOL={facts['Protocol']}, SEEDS={seeds}: {facts['Length']};",
        f"benchmark `{facts['Benchmark']}`, on {facts['Hardware']}, in {facts['Arithmetic']} arithmetic.",
        "The quantized run in W8A8 less its BF16 baseline, with 95 % intervals. PTQ: that baseline in W8A8 without",
        "QAT; untouched: the checkpoint before any training.",
    ]
    return "\n".join(lines) + f"\n\n{table}\n\n{verdict.strip()}\n"


def claims(record: Path) -> str:
    """The verdicts of a record's factorial and audit, a claim a row, and what each rests on."""
    parts = []
    for name, study in studies.results(record).items():
        about = "; ".join(study["facts"][key] for key in ("Model", "Budget", "Benchmark", "Runs", "Hardware"))
        link = f"[all of it]({(record / name / f'{name}.md').relative_to(ROOT / 'experiments')})"
        parts += [f"`make {name}` ({about}; {link}):", studies.claims_table(study["claims"]).markdown()]
    return "\n\n".join(parts) + "\n"


_PAGES = {"README.md": results, "experiments/README.md": claims}


def written(page: str, text: str) -> str:
    """A page with its section as its record has it. Errors: SystemExit when it names no record."""
    write: Callable[[Path], str] = _PAGES[page]
    if not _SECTION.search(text):
        sys.exit(f"error: {page} has no section that `make docs` writes; see scripts/docs.py")
    return _SECTION.sub(lambda part: part[1] + write(ROOT / part[2]) + part[3], text)


def main() -> None:
    for page in _PAGES:
        now = (ROOT / page).read_text()
        if "--check" not in sys.argv:
            (ROOT / page).write_text(written(page, now))
        elif written(page, now) != now:
            sys.exit(f"error: {page} differs from its record; run `make docs`")


if __name__ == "__main__":
    main()
