"""A record: a suite's report, the archives of its runs (`qat.runs.archive`), and a table of these."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from qat.analysis.compare import comparison_of, setting
from qat.config import Config
from qat.errors import UserError
from qat.quant.rules import RULES
from qat.report.experiment import tasks_of, unlike
from qat.report.studies import TITLES, results
from qat.report.text import change, setting_text
from qat.runs import archive
from qat.runs.folder import Run
from qat.runs.identity import identity
from qat.utils import files

# Of a run's identity, what has a column of its own in the table of runs.
_COLUMNS = ("seed", "quant.format", "scaling.algo", "scaling.window", "optim.lr", "bf16_warmup_steps", "budget.steps")


def of_studies(report: Path) -> set[str]:
    """Return the runs and baselines of the studies in a report's folder, by name."""
    runs = {row[key] for study in results(report).values() for row in study["runs"] for key in ("run", "baseline")}
    files = report.glob("sensitivity/*/sensitivity.json")
    return runs | {json.loads(file.read_text(encoding="utf-8"))["request"]["run"] for file in files}


def keep_report(report: Path, record: Path) -> None:
    """Copy a report's folder into a record, without its pages, of megabytes, which their commands write again.

    Errors: UserError for a folder of no report.
    """
    studies = [name for name in (*TITLES, "sensitivity") if (report / name).exists()]
    if not studies and not (report / "report.md").exists():
        raise UserError(f"{report} has no report.md and no study; write it first: make report")
    record.mkdir(parents=True, exist_ok=True)
    for path in (*report.glob("report.md"), *report.glob("report.json"), *report.glob("*.png")):
        shutil.copy(path, record)
    for name in studies:
        shutil.copytree(report / name, record / name, ignore=shutil.ignore_patterns("*.html"), dirs_exist_ok=True)


def keep_runs(runs: Iterable[Run], record: Path) -> tuple[list[str], list[str]]:
    """Put runs into a record and write its runs.csv anew; (names archived, names left out as unfinished)."""
    archived, unfinished = archive.keep(runs, record)
    if archived:
        write_table(record)
    return archived, unfinished


def write_table(record: Path) -> None:
    """Write runs.csv, a row a run of the record. Scores are in percent and of W8A8 for a quantized run, else of BF16;
    differences are of the held-out loss in W8A8 from the baseline's, in nats a token, with 95 % intervals over texts.
    """
    (record / "runs.csv").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archive.restore(record, Path(folder))
        runs = [Run(path) for path in sorted(Path(folder).iterdir())]
        configs = {run.id: run.typed_config() for run in runs}
        others = _other_settings(configs)
        rows = [_row(run, configs[run.id], others[run.id]) for run in runs]
    tasks = tasks_of(row["scores"] for row in rows)
    texts = list(dict.fromkeys(text for row in rows for text in row["differences"]))
    measured, written = {"differences": texts, "scores": tasks}, io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    header = [*rows[0]["settings"], "loss_ape_percent"]
    table.writerow([*header, *(f"{text}_difference_nats" for text in texts), *(f"{task}_percent" for task in tasks)])
    for row in rows:
        differences, scores = ([row[key].get(name, "") for name in names] for key, names in measured.items())
        table.writerow([*row["settings"].values(), row["ape"], *differences, *scores])
    files.replace(record / "runs.csv", written.getvalue())


def _row(run: Run, cfg: Config, others: str) -> dict:
    quantized, algo = cfg.quantized, cfg.scaling.algo
    settings = {
        "run": run.id,
        "experiment": cfg.experiment or "",
        "seed": cfg.seed,
        "format": cfg.quant.format if quantized else "bf16",
        "scaling": algo if quantized else "",
        "window": cfg.scaling.window if quantized and "window" in RULES[algo].reads else "",
        "lr": f"{cfg.optim.lr:g}" if cfg.budget.steps else "",
        "bf16_warmup_steps": cfg.bf16_warmup_steps if quantized else "",
        "steps": cfg.steps if cfg.budget.steps else 0,
        "other_settings": others,
    }
    comparison = comparison_of(run, cfg.benchmark.name) if quantized else None
    modes, mode = run.evaluations().get(cfg.benchmark.name, {}), "w8a8" if quantized else "bf16"
    # That of the pretrained checkpoint goes on with a hash of its texts.
    scored = next((record for name, record in modes.items() if name.startswith(mode)), {"tasks": {}})
    held = [row for row in comparison["heldout"] if row["mode"] == "w8a8"] if comparison else []
    return {
        "settings": settings,
        "ape": f"{comparison['loss']['ape']:.4f}" if comparison else "",
        "differences": {row["text"]: change(row["difference"], row["ci"]) for row in held},
        "scores": {task: f"{100 * row['score']:.1f}" for task, row in scored["tasks"].items()},
    }


def _other_settings(configs: Mapping[str, Config]) -> dict[str, str]:
    """Return, by run, the settings without a column in which it is unlike most trained runs of its kind, quantized or
    not."""
    others = dict.fromkeys(configs, "")
    for quantized in (True, False):
        kind = {name: cfg for name, cfg in configs.items() if cfg.budget.steps and cfg.quantized == quantized}
        for key, values in unlike({name: identity(cfg) for name, cfg in kind.items()}).items():
            texts = {name: setting_text(setting(kind[name], key) if v is None else v) for name, v in values.items()}
            usual, _ = Counter(texts.values()).most_common(1)[0]
            for name, text in texts.items() if key not in _COLUMNS else ():
                others[name] += f" {key}={text}" if text != usual else ""
    return {name: text.strip() for name, text in others.items()}
