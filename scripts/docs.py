"""Write the marked sections of the pages, so that no number in them is typed by hand.

python scripts/docs.py            --check: only say whether they are up to date

A section stands between `<!-- WRITER of SOURCE: written by ... -->` and `<!-- end -->`; the writers are below.
"""

import ast
import dataclasses
import json
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import config
from qat.analysis.stats import half_width
from qat.cli.validate import CHOICES
from qat.report import studies, tables
from qat.report.experiment import published, scientific
from qat.report.text import interval, markdown, signed
from qat.utils.environment import ROOT

_FOUND = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments" / "README.md")
PAGES = sorted(str(path.relative_to(ROOT)) for path in _FOUND)
_SECTION = re.compile(r"(<!-- (\w+) of (\S+): written by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)


def findings(record: Path) -> str:
    """Return what a record found: a row an experiment with the question it asks, and three sentences."""
    report, factorial = (record / "report.md").read_text(), studies.results(record)["factorial"]
    columns = ["", "It asks", "Loss APE %: paper", "Loss APE %: here", "Held-out loss, nats: W8A8 minus BF16"]
    rows = [[name, asks, *cells[:3]] for name, asks, _, *cells in _experiments(report)]
    facts = _facts(report) | {"Length": _length(report, "exp8"), "Seed": _facts(report)["Seed"].replace("; ", ",")}
    about = (
        "`make suite SEEDS={Seed}` at the {Budget} budget, on {Hardware}: {Model}, {Length}. Means over seeds with 95 "
    )
    about = f"{about.format_map(facts)}% intervals."
    return "\n\n".join([about, _unbroken(markdown(columns, rows)), _sentences(report, factorial)]) + "\n"


def results(record: Path) -> str:
    """Return what a record found: a row an experiment, with the paper's recipe and what PTQ costs."""
    columns = ["", "Question", "The paper's recipe", "Loss APE %"]
    columns += ["Held-out loss, nats: W8A8 minus BF16", "W8A8 by PTQ minus BF16"]
    rows = [
        [*asked, here if known == "–" else f"{here}<br>(paper {known})", held, ptq]
        for *asked, known, here, held, ptq in _experiments((record / "report.md").read_text())
    ]
    return _unbroken(markdown(columns, rows)) + "\n"


def claims(study: Path) -> str:
    """Return the verdicts of a study, a claim a row, and what each rests on."""
    name, found = study.stem, json.loads(study.read_text())
    about = "; ".join(found["facts"][key] for key in ("Model", "Budget", "Benchmark", "Runs", "Hardware"))
    link = f"[all of it]({study.with_suffix('.md').relative_to(ROOT / 'experiments')})"
    return f"`make {name}` ({about}; {link}):\n\n{studies.claims_table(found['claims']).markdown()}\n"


def disagreements(paper: Path) -> str:
    """Return where the paper's text and its released code part, with the switch for each."""
    return tables.disagreements(yaml.safe_load(paper.read_text())).markdown() + "\n"


def costs(record: Path) -> str:
    """Return the ratios of a recorded benchmark without kernels; of what was measured twice, the later ones."""
    files = [json.loads((record / name).read_text()) for name in ("bench.json", "steps.json")]
    rows = {row["what"]: row for file in files for row in file["rows"]}
    cells = [
        [
            what,
            f"{row['median']:.2f}" + f" [{row['low']:.2f}, {row['high']:.2f}]" * (row["low"] < row["high"]),
            row["target"],
        ]
        for what, row in rows.items()
        if not what.startswith(("kernel", "commit", "step: bf16"))
    ]
    about = "; ".join(files[0]["facts"][key] for key in ("hardware", "arithmetic", "model", "batch"))
    return f"{about}:\n\n{markdown(['What : compared with', 'Ratio [smallest, largest]', 'Target'], cells)}\n"


def groups(folder: Path) -> str:
    """Return the groups of conf/, their defaults and their other options."""
    rows = []
    for each in yaml.safe_load((folder / "train.yaml").read_text())["defaults"]:
        group, default = next(iter(each.items())) if isinstance(each, dict) else (each, None)
        options = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        others = " ".join(f"`{option}`" for option in options if option != default)
        rows += [[f"`{group}=`", f"`{default or 'none'}`", others]] if options else []
    return markdown(["Group", "Default", "Other options"], rows) + "\n"


def keys(source: Path) -> str:
    """Return every key of the configuration by group, with its type, default and meaning: the comment beside it."""
    text = source.read_text()
    lines = text.split("\n")
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}

    def section(name: str, prefix: str, title: str) -> str:
        rows, below = [], []
        for node in (node for node in classes[name].body if isinstance(node, ast.AnnAssign)):
            key, kind = node.target.id, ast.unparse(node.annotation)
            inner = next((each for each in classes if each in kind), None)
            if inner:
                suffix = ".<task>" if kind.startswith("dict") else ""
                below += [section(inner, f"{prefix}{key}{suffix}.", f"`{prefix}{key}{suffix}`")]
            elif "ClassVar" not in kind:
                first, last = node.lineno - 1, node.end_lineno
                while lines[first - 1].lstrip().startswith("#"):
                    first -= 1
                meaning = " ".join(re.findall(r"(?:^ *|  )# (.*)", "\n".join(lines[first:last]), re.MULTILINE))
                choices = CHOICES.get(f"{prefix}{key}")
                kind = ", ".join(choices) if choices else kind.replace(" | None", " or null")
                rows.append([f"`{prefix}{key}`", kind, _default(name, key), re.sub(r"([|<])", r"\\\1", meaning)])
        table = markdown(["Key", "Type or choices", "Default", "Meaning"], rows) if rows else "As `data`."
        return "\n".join([f"### {title}", "", table, "", *below])

    return section("Config", "", "Top level").rstrip() + "\n"


WRITERS = {each.__name__: each for each in (findings, results, claims, disagreements, costs, groups, keys)}


def _default(name: str, key: str) -> str:
    field = next(each for each in dataclasses.fields(getattr(config, name)) if each.name == key)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "from its group" if value == config.MISSING else f"`{json.dumps(value)}`"


def _experiments(report: str) -> Iterator[list[str]]:
    """Yield name, question, recipe, loss APE (paper, here) and held-out loss (W8A8, PTQ) of each experiment."""
    overview = _rows(report, "Loss APE %, paper")
    for name, entry in published()["experiments"].items():
        own = {row[""].removeprefix(name).strip(): row for row in overview if row[""].split()[0] == name}
        apes, held, ptq = (
            "<br>".join(f"{label} {row[column]}".strip() for label, row in own.items())
            for column in ("ours", "Held-out loss, nats", "PTQ")
        )
        known = next(iter(own.values()))["Loss APE %, paper"].split(" ")[0] if own else "–"
        yield [name, entry["question"], entry["recipe"], known, apes or "–", held or _of_bf16(report, name), ptq or "–"]


def _of_bf16(report: str, name: str) -> str:
    """Return by learning rate, how far BF16 training has moved the held-out loss from the pretrained model's."""
    start, *rows = _rows(report, "Learning rate")
    steps, found = _length(report, name).split()[0], []
    for rate in map(scientific, published()["experiments"][name]["lr"]):
        own = [row for row in rows if row["Learning rate"] == rate and f"-{steps}steps-" in row["Weights"]]
        moved = [_numbers(row["Held-out loss, nats"])[0] - _numbers(start["Held-out loss, nats"])[0] for row in own]
        middle, half = fmean(moved), half_width(moved)
        found.append(f"lr {rate} {signed(middle, 4)} {interval([middle - half, middle + half], 4)}")
    return "BF16 minus the pretrained model:<br>" + "<br>".join(found)


def _sentences(report: str, factorial: dict) -> str:
    """Return what the numbers come to: loss, claims, benchmarks."""
    rows = {row["ours"] + row["Held-out loss, nats"]: row for row in _rows(report, "Loss APE %, paper")}.values()
    apes, held, ptq = ([_numbers(row[column]) for row in rows] for column in ("ours", "Held-out loss, nats", "PTQ"))
    limit, verdicts = published()["paper"]["thresholds"]["ape"], [claim["verdict"] for claim in factorial["claims"]]
    below, beyond = sum(ape[0] < limit for ape in apes), sum(ape[2] >= limit for ape in apes)
    seen = next(s for c in factorial["claims"] for s in c["statements"] if "exceed their predicted" in s["statement"])
    questions = re.search(r"\d+ questions", factorial["facts"]["Benchmark"])[0]
    drop = -min(_numbers(cell)[1] for row in rows for column, cell in row.items() if column.endswith(", points"))
    supported, contradicted = (verdicts.count(word) for word in ("supported", "contradicted"))
    others = len(verdicts) - supported - contradicted
    return "\n".join(
        (
            f"- **Loss**: the APE of {below} of {len(apes)} recipes is below the paper's {limit} %; {beyond} of their "
            f"intervals reach above it. W8A8 adds {_span(held)} to the held-out loss; PTQ, without QAT, adds "
            f"{_span(set(ptq))}.",
            f"- **Claims** of the paper: of {len(verdicts)} that were tested {supported} are supported, {contradicted} "
            f"contradicted, {others} not decidable at this size. What the first one rests on is {seen['verdict']}: "
            f"under the max window fewer tensors exceed their predicted amax than under `most_recent`, {seen['text']} "
            "percentage points.",
            f"- **Benchmarks** decide nothing here: {questions} leave room for a drop of {drop:.0f} percentage points.",
        )
    )


def _span(triples: Collection[Sequence[float]]) -> str:
    """Return the smallest and largest of several estimates, and how many of their intervals exclude zero."""
    low, high = (signed(end(value for value, *_ in triples), 4) for end in (min, max))
    sure = sum(low * high > 0 for _, low, high in triples)
    return f"{low} to {high} nats ({sure} of {len(triples)} intervals exclude 0)"


def _unbroken(table: str) -> str:
    """Return a table whose intervals stay on one line."""
    return re.sub(r"(\[[+\-.\d]+,) ", "\\1\N{NO-BREAK SPACE}", table)


def _numbers(cell: str) -> tuple[float, ...]:
    return tuple(map(float, re.findall(r"[+-]?\d+\.\d+", cell)))


def _facts(report: str) -> dict[str, str]:
    return dict(re.findall(r"^- (\w+): (.+)$", report, re.MULTILINE))


def _length(report: str, name: str) -> str:
    """Steps and batch of an experiment, in words."""
    lengths = _facts(report)["Length"].split("; ")
    return next(each for each in lengths if "(" not in each or re.search(rf"\b{name}\b", each)).split(" (")[0]


def _rows(report: str, column: str) -> list[dict[str, str]]:
    """Return the first table that has a column, a dictionary a row."""
    table = re.search(rf"^\|[^\n]*\| {re.escape(column)} .*?(?=\n\n)", report, re.DOTALL | re.MULTILINE)[0]
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n"))
    return [dict(zip(header, line, strict=True)) for line in lines]


def written(text: str) -> str:
    """Return a page with each of its sections as its source has it."""
    return _SECTION.sub(lambda found: found[1] + WRITERS[found[2]](ROOT / found[3]) + found[4], text)


def main() -> None:
    for page in PAGES:
        now = (ROOT / page).read_text()
        if "--check" not in sys.argv:
            (ROOT / page).write_text(written(now))
        elif written(now) != now:
            sys.exit(f"error: {page} differs from its sources; run `make docs`")


if __name__ == "__main__":
    main()
