"""Weights & Biases as a mirror of the run folder: offline by default, never in the way of a run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from qat import ranks
from qat.config import Config
from qat.runs import Run


@contextlib.contextmanager
def mirror(run: Run, cfg: Config):
    """A function log(row, step) that mirrors rows to W&B, and `log.summary` to set results; nothing with logger=local.

    One W&B run stands for one run folder: training and evaluation, and every resume, share its id.
    """
    if cfg.logger.name == "local" or cfg.logger.mode == "disabled" or not ranks.first():
        yield _Silent()
        return
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        session = _start(wandb, run, cfg, cfg.logger.mode)
    except wandb.errors.Error as error:
        reason = str(error).strip().split("\n")[0]
        print(f"warning: W&B is out of reach ({reason}); mirroring offline, to be sent by `wandb sync`", flush=True)
        session = _start(wandb, run, cfg, "offline")
    try:
        yield _Wandb(session)
    except BaseException:
        session.finish(exit_code=1)
        raise
    session.finish()


def _start(wandb, run: Run, cfg: Config, mode: str):
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
        resume="allow",
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )


def _tags(cfg: Config) -> list[str]:
    quantization = [cfg.quant.format, cfg.scaling.algo] if cfg.quantized else ["bf16"]
    return [cfg.protocol, cfg.budget.name, cfg.model.name, *quantization, f"seed{cfg.seed}"]


class _Silent:
    def __call__(self, row: dict, step: int) -> None: ...

    def summary(self, values: dict) -> None: ...


class _Wandb:
    def __init__(self, session):
        self.session = session

    def __call__(self, row: dict, step: int) -> None:
        self.session.log({f"train/{k}": v for k, v in row.items() if k != "step" and v is not None}, step=step)

    def summary(self, values: dict) -> None:
        """Flat name -> number; shown as sortable columns."""
        self.session.summary.update(values)
