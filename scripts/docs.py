"""Write the README's table of results from the record it names, so that no number in it is typed by hand.

python scripts/docs.py            --check: only say whether it is up to date
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SECTION = re.compile(r"(<!-- from (\S+): written by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)


def results(report: str) -> str:
    """The part of a record's report.md that the README shows: settings, the table "At a glance", the verdict."""
    facts = dict(re.findall(r"^- (\w+): (.+)$", report, re.MULTILINE))
    table = re.search(r"^## At a glance\n.*?\n(\|.*?)\n\n", report, re.DOTALL | re.MULTILINE)[1]
    verdict = report.split("\n\n")[1]
    budget, _, size = facts["Budget"].partition(", ")
    return (
        f"`make suite` at BUDGET={budget}, PROTOCOL={facts['Protocol']}, SEED={facts['Seed']}: {size} a run,\n"
        f"benchmark `{facts['Benchmark']}`, on {facts['Hardware']}, in "
        f"{facts['Arithmetic']} arithmetic. The quantized run in W8A8 less its BF16 baseline, with 95 % intervals.\n\n"
        f"{table}\n\n> {verdict}\n"
    )


def written(readme: str) -> str:
    """The README with its section as the record has it. Errors: SystemExit when it names no record."""
    found = _SECTION.search(readme)
    if not found:
        sys.exit("error: README.md has no section that `make docs` writes; see scripts/docs.py")
    report = ROOT / found[2] / "report.md"
    return _SECTION.sub(lambda part: part[1] + results(report.read_text()) + part[3], readme)


def main() -> None:
    path = ROOT / "README.md"
    now = path.read_text()
    if "--check" in sys.argv:
        sys.exit(0 if written(now) == now else "error: README.md differs from its record; run `make docs`")
    path.write_text(written(now))


if __name__ == "__main__":
    main()
