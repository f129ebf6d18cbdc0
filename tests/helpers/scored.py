"""A tiny exp8, trained and scored with its baseline: what tests of evaluation look at (`scored` of conftest.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qat.cli import runner
from qat.cli.runner import evaluate_and_compare as score
from qat.config import TaskConfig
from qat.eval.subject import Subject
from qat.runs import identity
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, heldout_texts, pretrained_mode, pretrained_of, ptq_mode

TASKS = {"hellaswag": TaskConfig(shots=0, limit=2), "arc_easy": TaskConfig(shots=0, limit=4)}
WORDS = ("experiment=exp8", "optim.lr=1e-4")


def tensors(run: Run) -> dict:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in run.checkpoints.rglob("*.*")}


def silent(cfg):
    """The same, not mirrored."""
    return dataclasses.replace(cfg, logger=dataclasses.replace(cfg.logger, mode="disabled"))


def subjects(cfg) -> dict[str, Subject]:
    pretrained, baseline = pretrained_of(cfg), baseline_of(cfg)
    named = {
        "pretrained": (pretrained, pretrained, pretrained_mode(heldout_texts(cfg))),
        "baseline": (baseline, baseline, "bf16"),
        "ptq": (identity.ptq_of(cfg), baseline, ptq_mode(cfg.quant)),
        "bf16": (cfg, cfg, "bf16"),
        "w8a8": (cfg, cfg, "w8a8"),
    }
    return {name: Subject(each, Run.of(owner), mode) for name, (each, owner, mode) in named.items()}


def train_and_score(configure, folder: Path):
    """(configuration of a run that was trained and scored, its comparison, its checkpoint's files before scoring)"""
    cfg = configure(folder, *WORDS, "logger=wandb", **{"benchmark.tasks": TASKS})
    runner.train_with_baseline(silent(cfg))
    before = tensors(Run.of(cfg)) | tensors(Run.of(baseline_of(cfg)))
    score(silent(baseline_of(cfg)))
    return cfg, score(cfg), before
