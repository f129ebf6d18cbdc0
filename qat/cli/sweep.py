"""What became of each job of a sweep. Hydra's launchers run jobs here, in other processes or on other machines, and
hand nothing back once one has raised; so a job writes its outcome to a file in the sweep's folder, and raises nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from qat.cli.outcomes import Outcome, attempt, print_table, summarize
from qat.errors import ConfigError, UserError
from qat.utils import environment, files
from qat.utils.signals import Preempted


class Sweep(Callback):
    """Hydra's callback (conf/train.yaml): learns the folder of the sweep that this process started."""

    folder: Path | None = None  # None: it is a single run

    def on_multirun_start(self, config, **_) -> None:
        Sweep.folder = Path(config.hydra.sweep.dir)


def run(job: Callable[[], None]) -> None:
    """Do a job. In a sweep its outcome is written down and nothing but Ctrl-C is raised; of many ranks, the failure of
    one ends the process, for it must not begin the next job while the others wait for it in this one."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        job()
        return
    folder, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)

    def write(state: str, reason: str) -> None:
        content = {"overrides": overrides, "state": state, "reason": reason}
        files.replace(folder / f"job-{hydra.job.num:04}.json", json.dumps(content))

    def work() -> None:
        _refuse_dropped(hydra)
        job()

    if any(outcome.state == "preempted" for _, outcome in _outcomes(folder)):
        write("preempted", "not begun")  # the machine is taken away from all of them
        return
    write("failed", "ended without a word")  # unless it lives to say more
    try:
        outcome, error = attempt("", work)
    except Preempted as stop:
        write("preempted", str(stop))
        return
    except KeyboardInterrupt:
        write("stopped", "Ctrl-C")
        raise
    write(outcome.state, outcome.reason)
    if error and environment.world_size() > 1 and not isinstance(error, ConfigError):  # which every rank knows
        if isinstance(error, UserError):
            raise error
        sys.exit(1)


def _refuse_dropped(hydra) -> None:
    """Raise `ConfigError` for an experiment that is a sweep itself, which Hydra drops in a sweep over experiments."""
    given = {override.partition("=")[0] for override in hydra.overrides.task}
    dropped = [f"{key}={values}" for key, values in (hydra.sweeper.params or {}).items() if key not in given]
    if dropped:
        experiment = " ".join(override for override in hydra.overrides.task if override.startswith("experiment="))
        raise ConfigError(
            f"{experiment}: sweeps {' '.join(dropped)} itself, which a sweep over experiments drops; start it in a "
            f"command of its own"
        )


def report() -> int:
    """Print what became of every job of this process's sweep, if it has one. Returns the exit code."""
    if Sweep.folder is None or not Sweep.folder.exists() or not (jobs := _outcomes(Sweep.folder)):
        return 0
    shared = set.intersection(*(set(overrides) for overrides, _ in jobs)) if len(jobs) > 1 else set()
    for overrides, outcome in jobs:
        outcome.name = " ".join(override for override in overrides if override not in shared)
    outcomes = [outcome for _, outcome in jobs]
    print_table(outcomes, " ".join(["sweep:", *(override for override in jobs[0][0] if override in shared)]))
    code, line = summarize(outcomes)
    if code:
        print(f"error: {line}" if code == 2 else line, file=sys.stderr)
    return code


def _outcomes(folder: Path) -> list[tuple[list[str], Outcome]]:
    """Return the overrides of a sweep's jobs, as far as they have begun, and what became of each."""
    folder.chmod(folder.stat().st_mode)  # an NFS client then lists the folder anew, with what other machines wrote
    jobs = [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]
    return [(job["overrides"], Outcome("", job["state"], job["reason"])) for job in jobs]
