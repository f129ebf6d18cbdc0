"""Handle the signals by which a scheduler stops a job.

They act like Ctrl-C, but the training step under way is finished and saved first. Then the handler that was installed
before gets the signal (submitit's requeues the job); without one, the exit code asks to be tried again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

REQUEUE = 75  # exit code for a temporary failure (EX_TEMPFAIL of sysexits.h): try again
# SLURM sends SIGTERM before it takes a node away; users and submitit ask for the others (`sbatch --signal`).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(KeyboardInterrupt):
    """A run was stopped by one of `SIGNALS` and is saved. The message says by which and after which step."""

    received: list[signal.Signals] | None = None  # all signals that came until the run was saved


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raise `Preempted` upon `SIGNALS` within this context, except for signals that already have a handler.

    It also creates the file that $HIF8_REQUEUE names, for launchers that lose the exit code.
    """
    unhandled = [number for number in SIGNALS if _may_handle() and signal.getsignal(number) is signal.SIG_DFL]
    for number in unhandled:
        signal.signal(number, _stop)
    try:
        yield
    except Preempted:
        if os.environ.get("HIF8_REQUEUE"):
            Path(os.environ["HIF8_REQUEUE"]).touch()
        raise
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _) -> None:
    # The joblib launcher trains in child processes: pass the signal on, and return once each has saved its run.
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, number)
    if not workers:
        raise Preempted(signal.Signals(number).name)


@contextlib.contextmanager
def defer_signals() -> Iterator[Callable[[], str | None]]:
    """Record `SIGNALS` within this context and do nothing else; yields a function that names the first, or None."""
    received: list[signal.Signals] = []
    if not _may_handle():
        yield lambda: None
        return

    def record(number: int, _) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield lambda: received[0].name if received else None
    except Preempted as stop:
        stop.received = received
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forward(stop: Preempted) -> None:
    """Call the handlers that were installed before with the signals received. Errors: raises `stop` without a handler.

    submitit's handler of a preemption requeues the job and ends the process; its handler of SIGTERM only returns, and
    the work may go on.
    """
    if not stop.received:
        raise stop
    for number in stop.received:
        handler = signal.getsignal(number)
        if not callable(handler) or handler is _stop:
            raise stop
        handler(number, None)


def _may_handle() -> bool:
    """Return whether this is the main thread: Python allows handlers nowhere else."""
    return threading.current_thread() is threading.main_thread()
