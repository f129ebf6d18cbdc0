"""Stops that a scheduler asks for. They act like Ctrl-C, but a training step that runs is finished and saved first.
Then whoever handled the signal before gets it (submitit requeues its job); else the exit code says: try again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

REQUEUE = 75  # exit code: a temporary failure (EX_TEMPFAIL of sysexits.h), to be tried again
# What SLURM sends before it takes a node away, and what users and submitit ask it to send (`sbatch --signal`).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(KeyboardInterrupt):
    """One of `SIGNALS` came and the run is saved. The message says which and after what step."""

    noticed: list[signal.Signals] | None = None  # all that came while the step ran and was saved


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """Let `SIGNALS` raise `Preempted` within this context, save those that somebody else handles already. When it
    passes on, the file that $HIF8_REQUEUE names is made, for launchers that lose the exit code."""
    free = [each for each in SIGNALS if _may_handle() and signal.getsignal(each) is signal.SIG_DFL]
    for each in free:
        signal.signal(each, _stop)
    try:
        yield
    except Preempted:
        if os.environ.get("HIF8_REQUEUE"):
            Path(os.environ["HIF8_REQUEUE"]).touch()
        raise
    finally:
        for each in free:
            signal.signal(each, signal.SIG_DFL)


def _stop(number: int, _) -> None:
    workers = multiprocessing.active_children()  # of the joblib launcher, which returns when each has saved its run
    for worker in workers:
        os.kill(worker.pid, number)
    if not workers:
        raise Preempted(signal.Signals(number).name)


@contextlib.contextmanager
def defer_signals() -> Iterator[Callable[[], str | None]]:
    """Do nothing upon `SIGNALS` within this context but notice them; yields a function that names the first one that
    came, or None."""
    came: list[signal.Signals] = []
    if not _may_handle():
        yield lambda: None
        return
    before = {each: signal.signal(each, lambda number, _: came.append(signal.Signals(number))) for each in SIGNALS}
    try:
        yield lambda: came[0].name if came else None
    except Preempted as stop:
        stop.noticed = came
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def forward(stop: Preempted) -> None:
    """Give what was noticed to the handlers of before. submitit's for a preemption requeues the job and ends the
    process; its handler of SIGTERM only returns, and the work may go on. Where there is none, the stop is raised again.
    """
    if not stop.noticed:
        raise stop
    for each in stop.noticed:
        handler = signal.getsignal(each)
        if not callable(handler) or handler is _stop:
            raise stop
        handler(each, None)


def _may_handle() -> bool:
    """Python sets handlers in the main thread only; in others, signals act as ever."""
    return threading.current_thread() is threading.main_thread()
