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
from qat.analysis.compare import APE_THRESHOLD
from qat.analysis.stats import half_width
from qat.cli.validate import CHOICES
from qat.report import studies, tables
from qat.report.experiment import published, scientific
from qat.report.text import interval, markdown, signed
from qat.studies.registration import MEASURES
from qat.utils.environment import ROOT

_FOUND = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments" / "README.md")
PAGES = sorted(str(path.relative_to(ROOT)) for path in _FOUND)
_SECTION = re.compile(r"(<!-- (\w+) of (\S+): written by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)


def findings(record: Path) -> str:
    """Return what a record found: a row an experiment with the question it asks, and three sentences."""
    report, factorial = _report(record), studies.results(record)["factorial"]
    columns = ["", "It asks", "Loss APE %: paper", "Loss APE %: here", "Held-out loss, nats: W8A8 minus BF16"]
    rows = [[name, asks, *cells[:3]] for name, asks, _, *cells in _experiments(report)]
    about = (
        "`make suite SEEDS={Seed}` at the {Budget} budget, on {Hardware}: {Model}, {Length}. Means over seeds with 95 "
    )
    facts = report["provenance"]
    facts |= {"Length": report["lengths"]["exp8"], "Seed": facts["Seed"].replace("; ", ",")}
    about = f"{about.format_map(facts)}% intervals."
    return "\n\n".join([about, _unbroken(markdown(columns, rows)), _sentences(report, factorial)]) + "\n"


def results(record: Path) -> str:
    """Return what a record found: a row an experiment, with the paper's recipe and what PTQ costs."""
    columns = ["", "Question", "The paper's recipe", "Loss APE %"]
    columns += ["Held-out loss, nats: W8A8 minus BF16", "W8A8 by PTQ minus BF16"]
    rows = [
        [*asked, here if known == "–" else f"{here}<br>(paper {known})", held, ptq]
        for *asked, known, here, held, ptq in _experiments(_report(record))
    ]
    return _unbroken(markdown(columns, rows)) + "\n"


def claims(study: Path) -> str:
    """Return the verdicts of a study, a claim a row, and what each rests on."""
    name, found = study.stem, json.loads(study.read_text())
    about = "; ".join(found["facts"][key] for key in ("Model", "Budget", "Benchmark", "Runs", "Hardware"))
    link = f"[all of it]({study.with_suffix('.md').relative_to(ROOT / 'experiments')})"
    return f"`make {name}` ({about}; {link}):\n\n{studies.claims_table(found['claims']).markdown()}\n"


def registered(claims: Path) -> str:
    """Return what the registered claims rest on, a measure a row, and the damage that the measures were shown."""
    tree, rows = yaml.safe_load(claims.read_text()), []
    for claim in (claim for study in ("factorial", "audit") for claim in tree[study]["claims"].values()):
        name, control = claim["claim"], f"`{claim['control']}`"
        for measure, entry in claim["measures"].items():
            margin = entry["margin"] and f"{tree['margins'][entry['margin']]:g} % of the {entry['margin']}"
            rows.append([name, MEASURES[measure], margin or "–", str(entry["detectable"] or "–"), control])
            name = control = ""
    table = markdown(["Claim", "Measure", "Margin", "Detectable", "Control"], rows)
    return "\n".join([table, "", *(f"- `{name}`: {seen}" for name, seen in tree["controls"].items())]) + "\n"


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


WRITERS = {each.__name__: each for each in (findings, results, claims, registered, disagreements, costs, groups, keys)}


def _default(name: str, key: str) -> str:
    field = next(each for each in dataclasses.fields(getattr(config, name)) if each.name == key)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "from its group" if value == config.MISSING else f"`{json.dumps(value)}`"


def _report(record: Path) -> dict:
    return json.loads((record / "report.json").read_text(encoding="utf-8"))


def _experiments(report: dict) -> Iterator[list[str]]:
    """Yield name, question, recipe, loss APE (paper, here) and held-out loss (W8A8, PTQ) of each experiment."""
    for name, entry in published()["experiments"].items():
        own = [recipe for recipe in report["recipes"] if recipe["experiment"] == name]
        labels = [recipe["label"].removeprefix(name).strip() for recipe in own]
        apes, held, ptq = (
            "<br>".join(f"{label} {_text(*row, digits, plus)}".strip() for label, row in zip(labels, rows, strict=True))
            for rows, digits, plus in zip(_estimates(own), (3, 4, 4), ("", "+", "+"), strict=True)
        )
        known = str(entry.get("ape", entry.get("ape_log", "–"))) if own else "–"
        yield [name, entry["question"], entry["recipe"], known, apes or "–", held or _of_bf16(report, name), ptq or "–"]


def _estimates(recipes: Sequence[dict]) -> list[list[tuple[float, ...]]]:
    """Return (value, low, high) of the recipes' loss APE, and of their held-out loss in W8A8 and by PTQ, minus BF16."""
    columns = [[], [], []]
    for comparison in (recipe["comparison"] for recipe in recipes):
        first = {row["mode"]: row for row in reversed(comparison["heldout"])}
        columns[0].append((comparison["loss"]["ape"], *comparison["loss"]["ci"]))
        for column, mode in zip(columns[1:], ("w8a8", "ptq"), strict=True):
            column.append((first[mode]["difference"], *first[mode]["ci"]))
    return columns


def _text(value: float, low: float, high: float, digits: int = 4, plus: str = "+") -> str:
    return f"{signed(value, digits, plus)} {interval((low, high), digits, plus)}"


def _of_bf16(report: dict, name: str) -> str:
    """Return by learning rate, how far BF16 training has moved the held-out loss from the pretrained model's."""
    lines = []
    for rate in published()["experiments"][name]["lr"]:
        own = [row for row in report["bf16"] if row["experiment"] == name and row["lr"] == rate]
        moved = [loss - row["pretrained"][text] for row in own for text, loss in list(row["heldout"].items())[:1]]
        middle, half = fmean(moved), half_width(moved)
        lines.append(f"lr {scientific(rate)} {_text(middle, middle - half, middle + half)}")
    return "BF16 minus the pretrained model:<br>" + "<br>".join(lines)


def _sentences(report: dict, factorial: dict) -> str:
    """Return what the numbers come to: loss, claims, benchmarks."""
    recipes = list({recipe["comparison"]["run"]: recipe for recipe in report["recipes"]}.values())
    apes, held, ptq = _estimates(recipes)
    limit, verdicts = APE_THRESHOLD, [claim["verdict"] for claim in factorial["claims"]]
    below, beyond = sum(ape < limit for ape, *_ in apes), sum(high >= limit for *_, high in apes)
    seen = next(s for c in factorial["claims"] for s in c["statements"] if "exceed their predicted" in s["statement"])
    questions = re.search(r"\d+ questions", factorial["facts"]["Benchmark"])[0]
    tasks = [row for recipe in recipes for row in recipe["comparison"]["tasks"] if row["mode"] == "w8a8"]
    drop = -min(row["ci"][0] for row in tasks)
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
