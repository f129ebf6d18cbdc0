"""Checkpoints that are damaged, or of another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qat.train import checkpoint
from tests.cli.bad_input.mistakes import DONE, STOPPED, WEIGHT, Case, World, flipped, unscored


def every(damage: Callable[[Path], None], pattern: str, run: str = STOPPED) -> Callable[[World], None]:
    """Damage these files of every checkpoint."""

    def prepare(world: World) -> None:
        files = sorted(world.run(run).checkpoints.glob(f"*/{pattern}"))
        assert files
        for file in files:
            damage(file)
        unscored(world.run(run))

    return prepare


def rewritten(change: Callable[[dict, dict], None], run: str = STOPPED) -> Callable[[World], None]:
    """Change the newest checkpoint's (tensors, facts), and its checksums with them."""

    def prepare(world: World) -> None:
        folder = world.run(run).checkpoints
        tensors, facts = checkpoint.latest(folder)
        change(tensors, facts)
        step = facts.pop("step")
        checkpoint.save(folder, step, tensors, facts)
        unscored(world.run(run))

    return prepare


def setting(group: str, name: str, value) -> Callable[[dict, dict], None]:
    """value: a tensor, or a function of the one that is there."""

    def change(tensors: dict, _: dict) -> None:
        tensors[group][name] = value(tensors[group][name]) if callable(value) else value

    return change


FIX = "; resume with the configuration it was made with, or delete the run folder"
RETRAIN = "delete the run folder to train it again"
CASES = [
    Case(STOPPED, f"checkpoints: no checkpoint can be read; {RETRAIN}", every(flipped, "optimizer.safetensors")),
    Case(DONE, f"checkpoints: no checkpoint can be read; {RETRAIN}", every(flipped, "model.safetensors", DONE), "eval"),
    Case(
        STOPPED,
        f"is of version 99 of the format, and this code reads up to 2: update the code, or {RETRAIN}",
        rewritten(lambda tensors, facts: facts.update(version=99)),
    ),
    Case(
        STOPPED,
        "is of the run another; put it back there, or delete it",
        rewritten(lambda tensors, facts: facts.update(run="another")),
    ),
    Case(STOPPED, f"model.safetensors lacks {WEIGHT}{FIX}", rewritten(lambda t, _: t["model"].pop(WEIGHT))),
    Case(
        STOPPED,
        f"has surplus, which this run does not have{FIX}",
        rewritten(setting("model", "surplus", torch.ones(1))),
    ),
    Case(
        STOPPED,
        f"has {WEIGHT} as float32[16, 32], this run has it as float32[32, 16]{FIX}",
        rewritten(setting("model", WEIGHT, torch.t)),
    ),
    Case(
        STOPPED,
        f"has {WEIGHT} as bfloat16[32, 16], this run has it as float32[32, 16]{FIX}",
        rewritten(setting("model", WEIGHT, torch.Tensor.bfloat16)),
    ),
    Case(
        STOPPED,
        f"optimizer.safetensors lacks {WEIGHT}/exp_avg{FIX}",
        rewritten(lambda t, _: t["optimizer"].pop(f"{WEIGHT}/exp_avg")),
    ),
    Case(
        STOPPED,
        f"optimizer.safetensors lacks model.embed_tokens.weight/exp_avg{FIX}",
        rewritten(lambda t, _: t.pop("optimizer")),
    ),
    Case(
        STOPPED,
        f"has {WEIGHT}/exp_avg_sq as float32[1], this run has it as float32[32, 16]{FIX}",
        rewritten(setting("optimizer", f"{WEIGHT}/exp_avg_sq", torch.ones(1))),
    ),
    Case(
        STOPPED,
        "rng.safetensors holds no state of a random number generator",
        rewritten(setting("rng", "cpu", torch.ones(1).byte())),
    ),
    Case(STOPPED, "the saved scales have no history of [64, ", rewritten(lambda t, _: t.pop("scales"))),
    Case(
        STOPPED,
        f"torch.float32{FIX}",
        rewritten(setting("scales", "history", lambda history: history[:, :1].clone())),
    ),
    Case(STOPPED, "the saved scales are of other tensors: ", rewritten(lambda _, facts: facts["scales"].reverse())),
    Case(DONE, f"model.safetensors lacks {WEIGHT}{FIX}", rewritten(lambda t, _: t["model"].pop(WEIGHT), DONE), "eval"),
    Case(DONE, "the saved scales have no history", rewritten(lambda t, _: t.pop("scales"), DONE), "eval"),
]
for case in CASES:
    case.began = case.script == "train"
