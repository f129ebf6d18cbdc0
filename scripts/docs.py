"""Write the marked sections of the pages, so that no number in them is typed by hand.

python scripts/docs.py            --check: only say whether they are up to date

A section stands between `<!-- WRITER of SOURCE: written by ... -->` and `<!-- end -->`; the writers are below.
"""

import ast
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import config
from qat.analysis.compare import MODES as ALL_MODES
from qat.analysis.stats import student
from qat.cli.validate import CHOICES
from qat.report import studies, tables
from qat.report.experiment import published, scientific
from qat.report.text import change, markdown
from qat.studies.registration import MEASURES
from qat.utils.environment import ROOT

_PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/README.md"))
PAGES = sorted(str(path.relative_to(ROOT)) for path in _PAGES)
_SECTION = re.compile(r"(<!-- (\w+) of (\S+): written by `make docs` -->\n).*?(<!-- end -->)", re.DOTALL)
MODES = {mode: name for mode, name in ALL_MODES.items() if mode != "control"}
TEXTS = {"embedded": "speeches", "wikipedia": "Wikipedia"}  # never trained on; the data's own kind first


def results(record: Path) -> str:
    """Return what a record found: a row an experiment, with the paper's recipe, by mode and held-out text."""
    columns = ["", "Question", "The paper's recipe", "Loss APE %", *MODES.values()]
    rows = []
    for name, entry, ape, cells in _experiments(_report(record)):
        by_mode = ["<br>".join(f"{where}:<br>{cells[mode, text]}" for text, where in TEXTS.items()) for mode in MODES]
        if not ape:  # of BF16 training itself
            by_mode[1:] = ["–", "–"]
        rows.append([name, entry["question"], entry["recipe"], ape or "–", *by_mode])
    return _unbroken(markdown(columns, rows)) + "\n"


def claims(study: Path) -> str:
    """Return the verdicts of a study, a claim a row, and what each rests on."""
    name, result = study.stem, json.loads(study.read_text())
    keys, facts = ("Model", "Budget", "Benchmark", "Measured on", "Runs", "Hardware"), result["facts"]
    about = "; ".join(facts[key] for key in keys if key in facts)
    link = f"[all of it]({study.with_suffix('.md').relative_to(ROOT / 'experiments')})"
    return f"`make {name}` ({about}; {link}):\n\n{studies.claims_table(result['claims']).markdown()}\n"


def verdicts(study: Path) -> str:
    """Return the verdicts of a study, a claim a row, and the estimate that each rests on."""
    rows = []
    for claim in json.loads(study.read_text())["claims"]:
        unmet = [premise for premise in claim["premises"] if premise["verdict"] != "supported"]
        own = [s for s in claim["statements"] if (s["verdict"], s["open"]) == (claim["verdict"], claim["open"])]
        decisive = (unmet or own)[0]
        measured = "" if decisive["estimate"] is None else f"{decisive['text']} {decisive['unit']}"
        rows.append([claim["claim"], f"**{studies.verdict(claim)}**", f"{decisive['statement']}: {measured or '–'}"])
    return _unbroken(markdown(["Claim", "Verdict", "What decides it"], rows)) + "\n"


def registered(claims: Path) -> str:
    """Return what the registered claims rest on, a measure a row, and the damage that the measures were shown."""
    tree, rows = yaml.safe_load(claims.read_text()), []
    for claim in (claim for part in tree.values() for claim in part.get("claims", {}).values()):
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
    files = [json.loads(path.read_text()) for path in sorted(record.glob("*.json"))]  # bench.json, steps.json
    rows = {row["what"]: row for file in files for row in file["rows"]}
    cells = [
        [
            what,
            f"{row['median']:.2f}" + f" [{row['low']:.2f}, {row['high']:.2f}]" * (row["low"] < row["high"]),
            row["target"],
        ]
        for what, row in rows.items()
        if not what.startswith(("kernel", "tick", "amax trace", "step: bf16"))
    ]
    about = "; ".join(files[0]["facts"][key] for key in ("hardware", "arithmetic", "model", "batch"))
    return f"{about}:\n\n{markdown(['What : compared with', 'Ratio [smallest, largest]', 'Target'], cells)}\n"


def groups(folder: Path) -> str:
    """Return the groups of conf/, their defaults and their other options."""
    rows = []
    for entry in yaml.safe_load((folder / "train.yaml").read_text())["defaults"]:
        group, default = next(iter(entry.items())) if isinstance(entry, dict) else (entry, None)
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
            inner = next((group for group in classes if group in kind), None)
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


_WRITERS = (results, claims, verdicts, registered, disagreements, costs, groups, keys)
WRITERS = {writer.__name__: writer for writer in _WRITERS}


def _default(name: str, key: str) -> str:
    field = next(field for field in dataclasses.fields(getattr(config, name)) if field.name == key)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "from its group" if value == config.MISSING else f"`{json.dumps(value)}`"


def _report(record: Path) -> dict:
    return json.loads((record / "report.json").read_text(encoding="utf-8"))


def _experiments(report: dict) -> Iterator[tuple[str, dict, str, dict]]:
    """Yield name, published entry, loss APE beside the paper's, and {(mode, text): decision and loss} of experiments.

    Of an experiment without a quantized run, what stands for W8A8 is how far BF16 training has moved the loss.
    """
    answers = {(name, row["mode"]): row["answers"] for row in report["verdicts"] for name in row["recipe"].split("/")}
    for name, entry in published()["experiments"].items():
        own = [recipe for recipe in report["recipes"] if recipe["experiment"] == name]
        labels = [(recipe["label"], recipe["label"].removeprefix(name).strip()) for recipe in own]
        apes = [(recipe["comparison"]["loss"]["ape"], recipe["comparison"]["loss"]["ci"]) for recipe in own]
        lines = [f"{short} {change(*ape, 3, '')}".strip() for (_, short), ape in zip(labels, apes, strict=True)]
        known = entry.get("ape", entry.get("ape_log"))
        lines += [f"(paper {known})"] if own and known else []
        cells = {
            (mode, text): "<br>".join(
                f"{short} **{answers[label, mode][text]['answer']}** {_change(answers[label, mode][text])}".strip()
                for label, short in labels
            )
            or _of_bf16(report, name, text)
            for mode in MODES
            for text in TEXTS
        }
        yield name, entry, "<br>".join(lines), cells


def _change(answer: dict, digits: int = 4) -> str:
    return change(answer["difference"], answer["ci"], digits)


def _of_bf16(report: dict, name: str, text: str) -> str:
    """Return by learning rate, how far BF16 training has moved the loss on a text from the pretrained model's."""
    lines = []
    for rate in published()["experiments"][name]["lr"]:
        own = [row for row in report["bf16"] if row["experiment"] == name and row["lr"] == rate]
        moved = student(np.array([row["heldout"][text] - row["pretrained"][text] for row in own]))
        lines.append(f"lr {scientific(rate)} {change(moved.value, moved.interval())}")
    return "BF16 minus pretrained:<br>" + "<br>".join(lines)


def _unbroken(table: str) -> str:
    """Return a table whose intervals stay on one line."""
    return re.sub(r"(\[[+\-.\d]+,) ", "\\1\N{NO-BREAK SPACE}", table)


def written(text: str) -> str:
    """Return a page with each of its sections as its source has it."""
    return _SECTION.sub(lambda part: part[1] + WRITERS[part[2]](ROOT / part[3]) + part[4], text)


def main() -> None:
    for page in PAGES:
        now = (ROOT / page).read_text()
        if "--check" not in sys.argv:
            (ROOT / page).write_text(written(now))
        elif written(now) != now:
            sys.exit(f"error: {page} differs from its sources; run `make docs`")


if __name__ == "__main__":
    main()
