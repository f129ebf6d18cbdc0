"""What became of each job of a sweep. Hydra's launchers run jobs here, in other processes or on other machines, and
hand nothing back once one has raised; so a job writes its outcome to a file in the sweep's folder, and raises nothing.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from qat.errors import ConfigError, UserError
from qat.utils import environment, files
from qat.utils.signals import REQUEUE, Preempted


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
    folder, number, words = Path(hydra.runtime.output_dir), hydra.job.num, list(hydra.overrides.task)

    def became(state: str, reason: str = "") -> None:
        outcome = {"words": words, "state": state, "reason": reason}
        files.replace(folder / f"job-{number:04}.json", json.dumps(outcome))

    if any(outcome["state"] == "preempted" for outcome in _outcomes(folder)):
        became("preempted", "not begun")  # the machine is taken away from all of them
        return
    became("begun")
    try:
        _refuse_dropped(hydra)
        job()
        became("done")
    except UserError as error:
        became("failed", str(error))
        if environment.world_size() > 1 and not isinstance(
            error, ConfigError
        ):  # of a bad configuration every rank knows
            raise
    except Preempted as stop:
        became("preempted", str(stop))
    except KeyboardInterrupt:
        became("stopped", "Ctrl-C")
        raise
    except Exception as error:  # a defect of ours, to be seen whole where the job ran
        traceback.print_exc()
        became("failed", " ".join(f"{type(error).__name__}: {error}".split())[:400])
        if environment.world_size() > 1:
            sys.exit(1)


def _refuse_dropped(hydra) -> None:
    """Raise `ConfigError` for an experiment that is a sweep itself, which Hydra drops in a sweep over experiments."""
    given = {word.partition("=")[0] for word in hydra.overrides.task}
    dropped = [f"{key}={values}" for key, values in (hydra.sweeper.params or {}).items() if key not in given]
    if dropped:
        words = " ".join(word for word in hydra.overrides.task if word.startswith("experiment="))
        raise ConfigError(
            f"{words}: sweeps {' '.join(dropped)} itself, which a sweep over experiments drops; start it in a command "
            f"of its own"
        )


def report() -> int:
    """Print what became of every job of this process's sweep, if it has one. Returns the exit code: 2 when one failed,
    else REQUEUE when one was preempted, else 0."""
    if Sweep.folder is None or not Sweep.folder.exists() or not (outcomes := _outcomes(Sweep.folder)):
        return 0
    shared = set.intersection(*(set(outcome["words"]) for outcome in outcomes)) if len(outcomes) > 1 else set()
    print("\nsweep:", *(word for word in outcomes[0]["words"] if word in shared))
    for outcome in outcomes:
        if outcome["state"] == "begun":  # killed outright
            outcome |= {"state": "failed", "reason": "ended without a word"}
    cells = [" ".join(word for word in outcome["words"] if word not in shared) for outcome in outcomes]
    for outcome, cell in zip(outcomes, cells, strict=True):
        print(f"  {outcome['state']:<9}  {cell:<{max(map(len, cells))}}  {outcome['reason']}".rstrip())
    sys.stdout.flush()
    states = [outcome["state"] for outcome in outcomes]
    for state, code, start in (("failed", 2, "error: "), ("preempted", REQUEUE, "")):
        if state in states:
            count = f"{states.count(state)} of {len(states)} jobs"
            print(f"{start}{count} {state}; the same command runs only what is missing", file=sys.stderr)
            return code
    return 0


def _outcomes(folder: Path) -> list[dict]:
    folder.chmod(folder.stat().st_mode)  # an NFS client then lists the folder anew, with what other machines wrote
    return [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]
