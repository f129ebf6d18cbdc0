"""Stops that a scheduler asks for: after the step that runs, saved, with an exit code to requeue on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

REQUEUE = 75  # exit code: a temporary failure (EX_TEMPFAIL of sysexits.h), to be tried again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM sends before it takes a node away


class Preempted(KeyboardInterrupt):
    """One of `SIGNALS` came and the run is saved. The message says which and after what step."""


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], str | None]]:
    """Within this context `SIGNALS` do nothing but be noticed: yields a function that names the first one that came, or
    None. In a thread other than the main one, Python allows no handlers and they act as ever."""
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {each: signal.signal(each, lambda number, _: came.append(signal.Signals(number).name)) for each in SIGNALS}
    try:
        yield lambda: came[0] if came else None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
