"""Weights & Biases as a mirror of the run folder: offline by default, never in the way of a run.

One W&B run stands for one run folder: training, every resume and every evaluation share its id. W&B numbers the rows
of a run by their order; a session that continues at another step, or repeats one, would put its rows over others when
it is sent. So every session begins with all that the folder holds: the newest is always the whole run, each step once,
and sending it again replaces row by row what was sent before.
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
    """Return a function log(row, probed) that mirrors a step, its row of metrics and its telemetry, after those that
    the folder has already; at the end, the results of the folder and of its comparison. Nothing with logger=local.
    Where W&B fails, a warning says so and the run goes on without it; if `required`, it is a UserError."""
    if cfg.logger.name == "local" or cfg.logger.mode == "disabled" or not environment.is_main_process():
        yield lambda row, probed: None
        return
    session = _Session(run, cfg, required)
    try:
        yield _replayed(session, run, cfg)
    finally:
        session.finish(results(run, cfg, comparison), exit_code=0 if run.finished else 1)


def send(run: Run, cfg: Config, comparison: dict | None = None, required: bool = False) -> None:
    """Mirror what the folder holds, and its comparison with the baseline. With logger.mode=offline, `wandb sync` sends
    the result."""
    with run.lock(), mirror(run, cfg, comparison, required):
        pass


class _Session:
    """A session of W&B that anything may go wrong with: the first failure ends it."""

    def __init__(self, run: Run, cfg: Config, required: bool):
        self.run, self.required, self.failed = run, required, False
        self.session = self._attempt(_start, run, cfg)

    def log(self, points: dict[str, float], step: int) -> None:
        self._attempt(lambda: self.session.log(points, step=step))

    def finish(self, summary: dict[str, float], exit_code: int) -> None:
        self._attempt(lambda: self.session.summary.update(summary))
        self._attempt(lambda: self.session.finish(exit_code=exit_code))

    def _attempt(self, work: Callable, *given):
        if self.failed:
            return None
        try:
            return work(*given)
        except Exception as error:  # W&B's errors share no base, and pydantic's and the system's come through
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
    """End what W&B has begun: else its process would hold on to the run, and the next run would get its session."""
    with contextlib.suppress(Exception, SystemExit):
        sys.modules["wandb"].teardown()


def _reason(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:300]


def _start(run: Run, cfg: Config):
    """Return a session of W&B; offline where the server is out of reach."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    for older in (run.path / "wandb").glob("offline-run-*"):
        files.remove(older)  # one that stays is sent before the newer one, which replaces it
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
    # A server that is gone would be waited for for hours; what it has not got stays on disk.
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
        resume=None,  # what is there is written over; "allow" would append, and `wandb sync` does not know of it
        settings=wandb.Settings(**settings),
    )


def _tags(cfg: Config) -> list[str]:
    quantization = [cfg.quant.format, cfg.scaling.algo] if cfg.quantized else ["bf16"]
    tags = [cfg.protocol, cfg.budget.name, cfg.model.name, *quantization, f"seed{cfg.seed}"]
    return [tag[:64] for tag in tags]  # W&B takes no longer ones


def _replayed(session, run: Run, cfg: Config) -> Callable[[dict, Sequence[dict]], None]:
    """Return `session.log` for a step, after the steps of the folder."""
    baseline = Run.of(baseline_of(cfg)).metrics() if cfg.quantized else []
    losses = {row["step"]: row["loss"] for row in baseline}
    telemetry = defaultdict(list)
    for each in run.telemetry():
        telemetry[each["step"]].append(each)

    def log(row: dict, probed: Sequence[dict]) -> None:
        session.log(_points(row, probed, losses.get(row["step"])), step=row["step"])

    for row in ([{"step": 0}] if 0 in telemetry else []) + run.metrics():
        log(row, telemetry[row["step"]])
    return log


# What is shown ------------------------------------------------------------------------------------------------------


def _points(row: dict, probed: Sequence[dict], reference: float | None) -> dict[str, float]:
    """Return a step as flat numbers: its metrics, its loss against `reference`, the baseline's, and its telemetry. Step
    0 has only the latter."""
    flat = {f"train/{key}": value for key, value in row.items() if key != "step"}
    if reference is not None and row["loss"] is not None:
        difference = row["loss"] - reference
        flat |= {"compare/loss_difference": difference, "compare/loss_error_percent": 100 * abs(difference) / reference}
    for role in sorted({each["role"] for each in probed if "role" in each}):
        of_role = _telemetry([each for each in probed if each.get("role") == role])
        flat |= {f"telemetry/{role}/{key}": value for key, value in of_role.items()}
    for updated in (each["updated"] for each in probed if "updated" in each):
        flat |= {f"telemetry/lost_updates/{key}": 1 - share for key, share in updated.items() if share is not None}
    flat |= {f"validation/{each['text']}": each["loss"] for each in probed if "text" in each}
    return {key: value for key, value in flat.items() if value is not None}


def _telemetry(rows: list[dict]) -> dict[str, float | None]:
    """Return all tensors of a role in a few numbers: the worst of each fault, the share of tensors that overshoot, and
    the mean share of values in each tier."""
    flat = {f"{key}_max": max(row[key] for row in rows) for key in ("overshoot", "beyond", "underflow")}
    flat["overshoot_share"] = fmean(row["overshoot"] > TOLERANCE for row in rows)
    flat["sqnr_db_min"] = min((row["sqnr_db"] for row in rows if row["sqnr_db"] is not None), default=None)
    return flat | {tier: fmean(row[tier] for row in rows) for tier in ("tier3", "tier2", "tier1", "tier0")}


def results(run: Run, cfg: Config, comparison: dict | None) -> dict[str, float | str]:
    """Return what a folder comes to, flat, for dashboards to sort and filter by: how often it warned; of a compared run
    loss APE, held-out differences and KL, scores, points, relative drops and p-values by task and mode, and the pooled
    measures of the answers, with what is decided (`qat.analysis.decisions`); of a baseline its scores."""
    flat = {"warnings": len(run.warnings())}
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
