"""Kill a training command with SIGKILL at random moments, resume it each time, and compare what it leaves with an
uninterrupted run's.

python -m tests.helpers.torture [--kills 50] [--seed 0] [--warm] [any.key=value ...]
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat.runs import trace
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from tests.conftest import ROOT, RUNS, TINY, typed

WORDS = (*TINY, "experiment=exp8", "warmup.bf16=0.2", "scaling.discard_after_warmup=false", "budget.steps=40")
WORDS += ("budget.accumulation=1", "budget.checkpoint_every=2", "budget.telemetry_every=5")
KINDS = {"while it starts": 1, "in a step": 3, "while a checkpoint is written": 2}  # and how often each is drawn
_CLOCKS = ("seconds", "tokens_per_second")


def left(run: Run) -> dict:
    """Return everything that a run leaves behind, without what depends on the clock."""
    files = {path.name: path.read_bytes() for path in (*run.checkpoints.glob("*/*.*"), *run.path.glob(trace.NAME))}
    rows = [{key: value for key, value in row.items() if key not in _CLOCKS} for row in run.metrics()]
    scratch = sorted(path.name for path in run.path.rglob(".*") if path.name != ".lock")
    return {"files": files, "metrics": rows, "telemetry": run.telemetry(), "status": run.status(), "scratch": scratch}


def differences(ours: Run, theirs: Run) -> list[str]:
    """Return what differs between what two runs left, by name."""
    a, b = left(ours), left(theirs)
    names = sorted(a["files"].keys() | b["files"].keys())
    found = [name for name in names if a["files"].get(name) != b["files"].get(name)]
    return found + [name for name in ("metrics", "telemetry", "status", "scratch") if a[name] != b[name]]


@dataclass
class Kill:
    """A moment to kill at: once `rows` rows were written (baseline and run together), and then `delay` seconds after
    the next thing of its kind; of a start, after its beginning."""

    kind: str
    rows: int
    delay: float


def kills(count: int, seed: int, rows: int, starting: float) -> list[Kill]:
    """Random moments over a whole command, which writes so many rows and takes so many seconds to start, in the order
    in which they come."""
    draw = random.Random(seed)
    moments = sorted(draw.randrange(rows - 2) for _ in range(count))
    longest = {"while it starts": starting, "in a step": 0.05, "while a checkpoint is written": 0.02}
    drawn = draw.choices(list(KINDS), list(KINDS.values()), k=count)
    return [Kill(kind, row, draw.uniform(0, longest[kind])) for kind, row in zip(drawn, moments, strict=True)]


def command(words: Sequence[str], folder: Path) -> subprocess.Popen:
    """The real command in a process of its own; its runs in `folder`."""
    log = folder.with_suffix(".log").open("w")
    line = [sys.executable, str(ROOT / "scripts" / "train.py"), *words, f"{RUNS}={folder}"]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log)


class Forked(multiprocessing.get_context("fork").Process):
    """The command in a copy of this interpreter, which has imported everything already."""

    def __init__(self, words: Sequence[str], folder: Path):
        super().__init__(target=self._script, args=([*words, f"{RUNS}={folder}"], folder.with_suffix(".log")))
        self.start()

    @staticmethod
    def _script(words: list[str], log: Path) -> None:
        for number, path in ((1, Path(os.devnull)), (2, log)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [str(ROOT / "scripts" / "train.py"), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> None:
        self.join()


class Torture:
    """One command's runs in `folder`: the baseline and the run."""

    def __init__(self, words: Sequence[str], folder: Path, start: Callable = command):
        self.words, self.folder, self.start = words, folder, start
        cfg = typed(folder, *words)
        self.steps, self.runs = cfg.steps, [Run.of(baseline_of(cfg)), Run.of(cfg)]

    def finish(self) -> float:
        """Run the command to its end; seconds until its first new row."""
        began, first = time.time_ns(), None
        process = self.start(self.words, self.folder)
        while process.poll() is None:
            if first is None and self._rows(began) > 0:
                first = time.time_ns()
            time.sleep(0.001)
        self._ended(process)
        return ((first or time.time_ns()) - began) / 1e9

    def kill(self, kill: Kill) -> str | None:
        """Run the command and kill it at its moment. Returns where that was, or None when it had ended before."""
        began = time.time_ns()
        process = self.start(self.words, self.folder)
        while process.poll() is None and not self._reached(kill, began):
            time.sleep(0.0005)
        time.sleep(kill.delay)
        process.kill()
        process.wait()
        if process.returncode >= 0:
            self._ended(process)
            return None
        return self._where(began)

    def _reached(self, kill: Kill, began: int) -> bool:
        if kill.kind == "while it starts":
            return True
        return self._rows(began) >= kill.rows and (kill.kind == "in a step" or self._writing())

    def _rows(self, began: int) -> int:
        """Rows of metrics; of a run that is not finished, only if the process that began then works on it."""
        rows = 0
        for run in self.runs:
            path = run.path / "metrics.jsonl"
            if path.exists() and (run.finished or path.stat().st_mtime_ns > began):
                rows += path.read_bytes().count(b"\n")
        return rows

    def _writing(self) -> bool:
        return any(run.checkpoints.glob(".writing-*") for run in self.runs)

    def _where(self, began: int) -> str:
        run = next((run for run in self.runs if not run.finished), self.runs[-1])
        name = "baseline" if run is self.runs[0] else "run"
        path = run.path / "metrics.jsonl"
        if not path.exists() or path.stat().st_mtime_ns < began:
            return f"{name}: starting"
        doing = "writing a checkpoint" if any(run.checkpoints.glob(".writing-*")) else "training"
        return f"{name}: {doing} after step {len(run.metrics())}"

    def _ended(self, process) -> None:
        if process.returncode:
            said = self.folder.with_suffix(".log").read_text().splitlines()[-1:]
            sys.exit(f"error: the command failed with exit code {process.returncode}: {said}")


def torture(words: Sequence[str], folder: Path, count: int, seed: int, start: Callable = command) -> list[str]:
    """Kill the command `count` times, print where, and return what differs from an uninterrupted run."""
    reference = Torture(words, folder / "uninterrupted", start)
    starting = reference.finish()
    print(f"uninterrupted: {2 * reference.steps} steps, {starting:.1f} s until the first; seed {seed}")
    rounds = [Torture(words, folder / "killed-1", start)]
    places = []
    for kill in kills(count, seed, 2 * reference.steps, starting):
        place = rounds[-1].kill(kill)
        while place is None:  # it ended first: once more from nothing
            rounds.append(Torture(words, folder / f"killed-{len(rounds) + 1}", start))
            place = rounds[-1].kill(kill)
        places.append(place)
        print(f"  kill {len(places):>3}  {place}", flush=True)
    for each in rounds:
        each.finish()
    found = [
        f"{each.folder.name}, {name}: {what}"
        for each in rounds
        for name, ours, theirs in zip(("baseline", "run"), each.runs, reference.runs, strict=True)
        for what in differences(ours, theirs)
    ]
    counts = collections.Counter(place.partition(" after")[0] for place in places)
    print(json.dumps(counts, indent=1))
    print(f"{len(places)} kills, {len(rounds)} runs finished, {len(found)} differences", *found, sep="\n  ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="fork the commands: no kill hits their imports")
    parser.add_argument("words", nargs="*")
    chosen = parser.parse_args()
    start = command
    if chosen.warm:
        importlib.import_module("qat.train.loop")
        start = Forked
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(1 if torture((*WORDS, *chosen.words), Path(folder), chosen.kills, chosen.seed, start) else 0)


if __name__ == "__main__":
    main()
