"""Run folders that are damaged, edited, renamed or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from tests.cli.bad_input.mistakes import A_NAME, DONE, SMALL, STOPPED, Case, World


def writing(name: str, text: str, words: str = DONE) -> Callable[[World], None]:
    """Replace a file of a run folder."""

    def prepare(world: World) -> None:
        (world.run(words).path / name).write_text(text)

    return prepare


def breaking(name: str, words: str) -> Callable[[World], None]:
    """Break the second line of a file."""

    def prepare(world: World) -> None:
        path = world.run(words).path / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))

    return prepare


def editing(old: str, new: str) -> Callable[[World], None]:
    """Edit the configuration of DONE."""

    def prepare(world: World) -> None:
        path = world.done.path / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return prepare


def without_its_first_row(world: World) -> None:
    path = world.stopped.path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def file_for_folder(world: World) -> None:
    shutil.rmtree(world.stopped.checkpoints)
    world.stopped.checkpoints.write_text("not a folder")


def folder_for_file(world: World) -> None:
    (world.done.path / "status.json").unlink()
    (world.done.path / "status.json").mkdir()


RUN = "run={run}"
CASES = [
    Case(RUN, "config.yaml is damaged (", writing("config.yaml", "{"), "eval"),
    Case(RUN, "config.yaml is damaged (Key 'lrr' not in", editing("  lr:", "  lrr:"), "eval"),
    Case(RUN, "quant.format=hif9: unknown value", editing("format: hif8", "format: hif9"), "eval"),
    Case(RUN, "give the folder that name again", editing("lr: 0.0001", "lr: 0.0002"), "eval"),
    Case(RUN, f"benchmark.name='../x': {A_NAME}", editing("name: smoke\n  batch", "name: ../x\n  batch"), "eval"),
    Case(RUN, "budget.seq_len=1: must lie in", editing("seq_len: 32", "seq_len: 1"), "eval"),
    Case("run=runs/renamed", "give the folder that", lambda w: w.done.path.rename(w / "runs/renamed"), "eval"),
    Case(
        f"{RUN} optim.lr=1",
        "has no effect beside run=, which takes those of benchmark, validation, logger",
        script="eval",
    ),
    Case(f"{RUN} ++benchmark.name=x", "no effect beside run=, which takes those of export", script="export"),
    Case(f"{RUN} seed=1", "seed=1: has no effect beside run=", None, "dashboard"),
    Case("run=nowhere", "nowhere: not a run folder (no config.yaml); see `ls ", script="eval"),
    Case("run=texts", "texts: not a run folder (no config.yaml); see `ls ", script="eval"),
    Case("run=/", "not a run folder (no config.yaml)", script="eval"),
    Case("run=texts/00.txt", "texts/00.txt: not a run folder", script="eval"),
    Case(RUN, "status.json is damaged (a mapping was expected, not list)", writing("status.json", "[]"), "eval"),
    Case(RUN, "status.json is damaged ('step' is missing)", writing("status.json", '{"state": "stopped"}'), "eval"),
    Case(RUN, "status.json: Is a directory", folder_for_file, "eval"),
    Case(RUN, "eval.json is damaged (", writing("eval.json", '{"smoke": 3}'), "eval"),
    Case(RUN, "metrics.jsonl is damaged (", breaking("metrics.jsonl", DONE), "eval"),
    Case(f"{STOPPED} seed=5", "is not started; train it first", script="eval"),
    Case(STOPPED, "is at step 4 of 6; train it first", script="eval"),
    Case(STOPPED, "status.json is damaged (", writing("status.json", "\x00", STOPPED)),
    Case(STOPPED, "metrics.jsonl is damaged (", breaking("metrics.jsonl", STOPPED), began=True),
    Case(STOPPED, "telemetry.jsonl is damaged (", breaking("telemetry.jsonl", STOPPED), began=True),
    Case(STOPPED, "metrics.jsonl is damaged (no row for each of the 4 steps", without_its_first_row, began=True),
    Case(STOPPED, "checkpoints", file_for_folder, began=True),
    Case(f"{SMALL} seed=2 runs_dir=texts/00.txt", "texts/00.txt/tiny-bf16-", script="train"),
    Case(f"{SMALL} seed=2 runs_dir=/dev/null/x", "/dev/null/x", script="train"),
    Case(f"report.experiments=[exp7] report.out=texts/00.txt {DONE}", "texts/00.txt: File exists", script="report"),
]
