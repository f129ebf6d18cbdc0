"""Mirror the run folder to Weights & Biases: offline by default, and never a reason for a run to fail.

One W&B run stands for one run folder: training, every resume and every evaluation share its id. W&B numbers the rows of
a run by their order, so a session that continued at some step would overwrite the rows of other steps. Therefore every
session sends the whole folder again: the newest session is the whole run, every step once, and replaces the one before.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from qat.config import Config
from qat.errors import UserError
from qat.quant.formats import TOLERANCE
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.utils import environment, files


@contextlib.contextmanager
def mirror(run: Run, cfg: Config, comparison: dict | None = None, required: bool = False):
    """Mirror the folder and yield a function log(row, telemetry) that mirrors one more step.

    At the end, the results of the folder and of its comparison are sent. With logger=local nothing is. Where W&B fails,
    print a warning and go on without it, or if `required` raise a UserError.
    """
    if cfg.logger.name == "local" or cfg.logger.mode == "disabled" or not environment.is_main_process():
        yield lambda row, telemetry: None
        return
    session = _Session(run, cfg, required)
    try:
        yield _replay(session, run, cfg)
    finally:
        session.finish(results(run, cfg, comparison), exit_code=0 if run.finished else 1)


def send(run: Run, cfg: Config, comparison: dict | None = None, required: bool = False) -> None:
    """Mirror the folder and its comparison with the baseline. With logger.mode=offline, `wandb sync` sends that."""
    with run.lock(), mirror(run, cfg, comparison, required):
        pass


class _Session:
    """A session of W&B. Its first failure, of whatever kind, ends it."""

    def __init__(self, run: Run, cfg: Config, required: bool):
        self.run, self.required, self.failed = run, required, False
        self.session = self._attempt(_start, run, cfg)

    def log(self, points: dict[str, float], step: int) -> None:
        self._attempt(lambda: self.session.log(points, step=step))

    def finish(self, summary: dict[str, float], exit_code: int) -> None:
        self._attempt(lambda: self.session.summary.update(summary))
        self._attempt(lambda: self.session.finish(exit_code=exit_code))

    def _attempt(self, work: Callable, *arguments):
        if self.failed:
            return None
        try:
            return work(*arguments)
        except Exception as error:  # any: W&B's own have no common base, and it passes on others
            self.failed = True
            _teardown()
            if self.required:
                raise UserError(f"{self.run.path}: W&B cannot mirror it ({_reason(error)}); mend that first") from error
            print(
                f"\nwarning: W&B fails ({_reason(error)}); the run goes on without it, to be mirrored by `python "
                f"scripts/dashboard.py run={self.run.path}`",
                flush=True,
            )


def _teardown() -> None:
    """End W&B's process: otherwise it would keep the run, and the next run would get its session."""
    with contextlib.suppress(Exception, SystemExit):
        sys.modules["wandb"].teardown()


def _reason(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:300]


def _start(run: Run, cfg: Config):
    """Start a session of W&B; an offline one where the server cannot be reached."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    for older in (run.path / "wandb").glob("offline-run-*"):
        files.remove(older)  # the new session replaces it
    if cfg.logger.mode == "online":
        try:
            return _init(wandb, run, cfg, "online")
        except Exception as error:
            print(
                f"warning: W&B is out of reach ({_reason(error)}); mirroring offline, to be sent by `wandb sync`",
                flush=True,
            )
            _teardown()
    return _init(wandb, run, cfg, "offline")


def _init(wandb, run: Run, cfg: Config, mode: str):
    settings = {"console": "off", "silent": True, "x_disable_stats": True}
    # By default W&B waits for hours for a server that is gone. What was not sent stays on disk.
    settings |= {"finish_timeout": 600, "finish_timeout_raises": True}
    return wandb.init(
        project=cfg.logger.project,
        id=run.id.rpartition("-")[2],
        name=run.id,
        group=cfg.experiment or "sweep",
        job_type="quantized" if cfg.quantized else "baseline",
        tags=_tags(cfg),
        config=run.config(),
        dir=str(Path(run.path).resolve()),
        mode=mode,
        resume=None,  # overwrite; "allow" would append, and `wandb sync` does not support it
        settings=wandb.Settings(**settings),
    )


def _tags(cfg: Config) -> list[str]:
    quantization = [cfg.quant.format, cfg.scaling.algo] if cfg.quantized else ["bf16"]
    tags = [cfg.protocol, cfg.budget.name, cfg.model.name, *quantization, f"seed{cfg.seed}"]
    return [tag[:64] for tag in tags]  # W&B's limit


def _replay(session, run: Run, cfg: Config) -> Callable[[dict, Sequence[dict]], None]:
    """Log the steps of the folder; returns a function that logs another."""
    baseline = Run.of(baseline_of(cfg)).metrics() if cfg.quantized else []
    losses = {row["step"]: row["loss"] for row in baseline}
    telemetry_of = defaultdict(list)
    for row in run.telemetry():
        telemetry_of[row["step"]].append(row)

    def log(row: dict, telemetry: Sequence[dict]) -> None:
        session.log(_points(row, telemetry, losses.get(row["step"])), step=row["step"])

    for row in ([{"step": 0}] if 0 in telemetry_of else []) + run.metrics():
        log(row, telemetry_of[row["step"]])
    return log


# What is shown ------------------------------------------------------------------------------------------------------


def _points(row: dict, telemetry: Sequence[dict], baseline_loss: float | None) -> dict[str, float]:
    """Return a step as flat numbers: metrics, loss against the baseline's, and telemetry. Step 0 has only the last."""
    flat = {f"train/{key}": value for key, value in row.items() if key != "step"}
    if baseline_loss is not None and row["loss"] is not None:
        difference = row["loss"] - baseline_loss
        flat["compare/loss_difference"] = difference
        flat["compare/loss_error_percent"] = 100 * abs(difference) / baseline_loss
    for role in sorted({entry["role"] for entry in telemetry if "role" in entry}):
        summary = _summarize([entry for entry in telemetry if entry.get("role") == role])
        flat |= {f"telemetry/{role}/{key}": value for key, value in summary.items()}
    for updated in (entry["updated"] for entry in telemetry if "updated" in entry):
        flat |= {f"telemetry/lost_updates/{key}": 1 - share for key, share in updated.items() if share is not None}
    flat |= _damage(telemetry)
    flat |= {f"validation/{entry['text']}": entry["loss"] for entry in telemetry if "text" in entry}
    return {key: value for key, value in flat.items() if type(value) in (int, float)}  # no flags, and no hash


def _summarize(rows: list[dict]) -> dict[str, float | None]:
    """Return the tensors of a role in a few numbers: the worst values, the share of tensors that overshoot, and the
    mean share of values in each tier."""
    flat = {f"{key}_max": max(row[key] for row in rows) for key in ("overshoot", "beyond", "underflow")}
    flat["overshoot_share"] = fmean(row["overshoot"] > TOLERANCE for row in rows)
    flat["sqnr_db_min"] = min((row["sqnr_db"] for row in rows if row["sqnr_db"] is not None), default=None)
    return flat | {tier: fmean(row[tier] for row in rows) for tier in ("tier3", "tier2", "tier1", "tier0")}


def _damage(telemetry: Sequence[dict]) -> dict[str, float]:
    """Return what quantization costs under each rule of `scaling.shadow`, in nats on the same weights and batches."""
    costs = defaultdict(list)
    for entry in telemetry:
        if "shadow" in entry and None not in (entry["loss"], entry["unquantized"]):
            costs[f"shadow/{entry['shadow']}/damage"].append(entry["loss"] - entry["unquantized"])
    return {key: fmean(values) for key, values in costs.items()}


def results(run: Run, cfg: Config, comparison: dict | None) -> dict[str, float | str]:
    """Return the results of a folder as flat values, which dashboards sort and filter by.

    All runs have the number of warnings, and what the rules of `scaling.shadow` cost. A compared run has loss APE,
    held-out differences and KL, scores, points, relative drops and p-values by task and mode, and the pooled measures
    of the answers with what is decided (`qat.analysis.decisions`). A baseline has its scores.
    """
    flat = {"warnings": len(run.warnings())} | _damage(run.telemetry())
    if comparison:
        flat["loss_ape_percent"] = comparison["loss"]["ape"]
        for row in (*comparison["tasks"], *comparison["pooled"]):
            keys = ("score", "points", "relative_drop", "p_value")
            flat |= {f"{row['mode']}/{row.get('task', 'pooled')}/{key}": row[key] for key in keys}
        for row in comparison["heldout"]:
            text = _heldout(row["text"], cfg)
            flat |= {f"{row['mode']}/{text}/{key}": row[key] for key in ("loss", "difference", "kl", "decision")}
        for row in comparison["measures"]:
            if row["task"] == "pooled":
                flat |= {f"{row['mode']}/pooled/{row['measure']}/{key}": row[key] for key in ("difference", "decision")}
    elif not cfg.quantized:
        record = run.evaluations().get(cfg.benchmark.name, {}).get("bf16", {"tasks": {}, "heldout": {}})
        flat |= {f"bf16/{task}/score": 100 * row["score"] for task, row in record["tasks"].items()}
        flat |= {f"bf16/{_heldout(name, cfg)}/loss": text["loss"] for name, text in record["heldout"].items()}
    return {key: value for key, value in flat.items() if value is not None}


def _heldout(text: str, cfg: Config) -> str:
    return "heldout" if text == cfg.data.name else f"heldout/{text}"
