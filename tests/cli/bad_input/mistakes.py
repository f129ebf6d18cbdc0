"""What a mistake is, and what it is made in."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qat.cli import runner
from qat.cli.runner import evaluate_and_compare
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.train import loop
from tests.conftest import typed
from tests.helpers.models import write_model

# A model of four blocks, six steps with a checkpoint after the second and the fourth, four questions.
SMALL = "model=tiny budget=smoke logger=local model.blocks=4 model.architecture.num_hidden_layers=4 quant.bf16_blocks=2"
SMALL += " model.architecture.hidden_size=16 model.architecture.intermediate_size=32 budget.steps=6"
SMALL += " budget.checkpoint_every=2 budget.accumulation=1 data.source=files data.path=texts runs_dir=runs"
SMALL += " ~benchmark.tasks.mmlu_continuation ~benchmark.tasks.arc_easy ~benchmark.tasks.arc_challenge"
SMALL += " ~benchmark.tasks.lambada"
STOPPED, DONE = f"{SMALL} seed=1", f"{SMALL} seed=0"  # after step 4 of 6; finished and scored
PLAIN = f"{SMALL} quant=bf16 seed=9"  # not begun
WEIGHT = "model.layers.1.mlp.up_proj.weight"  # of a layer that is quantized
A_NAME = "must be a name of at most 80 letters, digits, '.', '_' and '-' that does not start with '.'"


@dataclass
class Case:
    """A mistake: the script and its words ({run}: the folder of DONE), what the line must hold, and what prepares it.

    began: the run begins, so that its folder says that it failed and why. In a folder that was there, nothing else
    changes.
    """

    words: str
    wanted: str
    prepare: Callable[[World], None] | None = None
    script: str = "train"
    began: bool = False
    env: dict[str, str] | None = None

    def __str__(self) -> str:
        of = self.words.replace(STOPPED, "stopped").replace(DONE, "done").replace(PLAIN, "plain").replace(SMALL, "")
        return f"{self.script} {of}: {self.wanted[:60]}"


class World:
    """A folder with texts, a model, the finished run of DONE and the stopped one of STOPPED, with its own names."""

    def __init__(self, path: Path):
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def run(self, words: str) -> Run:
        cfg = typed(Path("runs"), *words.split())
        return Run(self.path / Run.of(cfg).path)

    @property
    def done(self) -> Run:
        return self.run(DONE)

    @property
    def stopped(self) -> Run:
        return self.run(STOPPED)


def build(path: Path) -> World:
    """Make what the mistakes are made in, in the folder `path`."""
    world = World(path)
    draw = random.Random(0)
    (world / "texts").mkdir()
    for number in range(24):
        text = " ".join("".join(draw.choices("etaoinshrdlu", k=5)) for _ in range(100))
        (world / "texts" / f"{number:02}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.path)
        done = typed(Path("runs"), *DONE.split())
        runner.train_with_baseline(done)
        evaluate_and_compare(done)
        stopped = typed(Path("runs"), *STOPPED.split())
        loop.train(baseline_of(stopped))
        patch.setattr(loop._Session, "_announce", stopping_before(5))
        with pytest.raises(KeyboardInterrupt):
            loop.train(stopped)
        write_model(world / "model", **done.model.architecture)
    return world


def stopping_before(step: int):
    def announce(_, current: int) -> None:
        if current == step:
            raise KeyboardInterrupt

    return announce


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def unscored(run: Run) -> None:
    """Leave W8A8, the last of four, to be scored."""
    found = run.evaluations()
    for modes in found.values():
        modes.pop("w8a8", None)
    run.write_json("eval.json", found)
