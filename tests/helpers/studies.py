"""What the cells of a study measured, invented with planted effects; and run folders that hold it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from omegaconf import OmegaConf

from qat.analysis.results import Outcomes
from qat.config import Config
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of, ptq_mode, run_id
from qat.studies.design import Cell, Key
from qat.studies.measures import Measured
from tests.helpers.synthetic_runs import edit, write_run

WORDS = ("model=tiny", "budget=smoke", "benchmark=quick", "logger=local")  # `write_run` calls its benchmark quick
TASKS = {"mmlu": 40, "arc_easy": 20}
_CURVE = np.linspace(3.4, 3.0, 12)


def invent(
    keys: Iterable[Key],
    seeds: Sequence[int] = (0,),
    damage: Callable[[Key, int], float] = lambda key, seed: 0.01,
    ape: Callable[[Key], float] = lambda key: 0.2,
    overshoot: Callable[[Key], float] = lambda key: 0.1,
    lost: Callable[[Key], float] = lambda key: 0.0,
    forgotten: Callable[[Key], float] = lambda key: 0.0,
    linears: Callable[[Key], int] = lambda key: 75,
    ptq: Callable[[Key], float] = lambda key: 0.02,
    sequences: int = 16,
    noise: float = 0.001,
    benchmark: str = "quick",
) -> list[Measured]:
    """damage, ptq: nats of held-out loss over the baseline's, to which each sequence of damage adds normal noise; ape:
    percent; lost: the share of the questions that a cell's baseline no longer answers, and neither does the run or PTQ;
    forgotten: nats of loss on other text that a cell's baseline has more than the pretrained model.
    """
    rng = np.random.default_rng(0)
    text, other, found = 3 + 0.3 * rng.random(sequences), 2.5 + 0.2 * rng.random(sequences), []
    for seed in seeds:
        for key in keys:
            before, after = (
                {
                    task: {
                        "accuracy": (np.arange(n) >= share * n).astype(float),
                        "contrast": np.cos(np.arange(n)) - 0.5,
                    }
                    for task, n in TASKS.items()
                }
                for share in (0, lost(key))
            )
            swing, kinds = 0.001 * np.cos(np.arange(sequences)), {}
            for kind, start, trained in (("embedded", text, -0.05), ("wikipedia", other, forgotten(key))):
                losses = {"pretrained": start, "baseline": start + trained}
                losses["ptq"] = losses["baseline"] + ptq(key) + swing
                for mode in ("w8a8", "bf16"):
                    losses[mode] = losses["baseline"] + damage(key, seed) + rng.normal(0, noise, sequences)
                kinds[kind] = losses
            right = {"w8a8": after, "bf16": after, "baseline": after, "pretrained": before, "ptq": after}
            run, base = f"run of {key}, {seed}", f"base at {lost(key)}, {forgotten(key)}, {seed}"
            shares = overshoot(key), 1e-4 * overshoot(key)
            scored = {
                name: Outcomes({kind: losses[name] for kind, losses in kinds.items()}, rows)
                for name, rows in right.items()
            }
            ptq_name = f"ptq of {linears(key)}"
            texts = ("embedded", "wikipedia")
            found.append(
                Measured(key, seed, benchmark, run, base, ptq_name, *texts, scored, ape(key), *shares, linears(key))
            )
    return found


def write(cells: Sequence[Cell], measured: Sequence[Measured]) -> None:
    """The run folders of cells that measured this, their baselines' and the pretrained checkpoint's."""
    for cell, m in zip(cells, measured, strict=True):
        _write(pretrained_of(cell.cfg), [], m, {"bf16": "pretrained"})
        mode = ptq_mode(cell.cfg.quant)
        _write(baseline_of(cell.cfg), _CURVE, m, {"bf16": "baseline", mode: "ptq"})
        run = _write(cell.cfg, _CURVE * (1 + m.ape / 100), m, {"bf16": "bf16", "w8a8": "w8a8"})
        edit(run.path / "metrics.jsonl", lambda row, m=m: row.update(overshoot_share=m.overshoot))
        (run.path / "telemetry.jsonl").write_text(json.dumps({"step": 1, "beyond": m.clipped}) + "\n")
        (run.path / "coverage.json").write_text(json.dumps({"linears": dict.fromkeys(map(str, range(m.linears)))}))
        m.run, m.baseline, m.ptq = run.id, run_id(baseline_of(cell.cfg)), mode


def _write(cfg: Config, losses: Sequence[float], m: Measured, scored: dict[str, str]) -> Run:
    """`scored`: what of `m` each mode is. A run that several cells share is written once."""
    run = Run.of(cfg)
    if not run.path.exists():
        settings = OmegaConf.to_container(OmegaConf.structured(cfg))
        names = {cfg.data.name: False, cfg.validation.name: True}
        texts = {
            mode: {text: m.losses(name, other=other) for text, other in names.items()} for mode, name in scored.items()
        }
        answers = {mode: m.scored[name].answers for mode, name in scored.items()}
        right = {mode: {task: rows["accuracy"] for task, rows in tasks.items()} for mode, tasks in answers.items()}
        write_run(run.path, settings, losses, right, texts)
    return run
