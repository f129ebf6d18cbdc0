"""What a scheduler's signals do outside of training, and who gets them afterwards; tests/train/test_loop.py has the
rest."""

from __future__ import annotations

import os
import signal

import pytest

from qat.utils import signals
from tests.conftest import TINY


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_outside_of_training_a_signal_stops_at_once(main, monkeypatch, number, tmp_path):
    monkeypatch.setenv("HIF8_REQUEUE", str(tmp_path / "requeue"))  # as scripts/slurm_job.sh does
    monkeypatch.setattr("qat.cli.runner.train_with_baseline", lambda _: os.kill(os.getpid(), number))
    assert main("train.py", *TINY) == (75, "", f"\n{number.name}: saved; the same command continues\n")
    assert (tmp_path / "requeue").exists()
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.fixture
def given():
    """Another's handlers of two signals, which only take note of them."""
    numbers = []
    before = {each: signal.signal(each, lambda number, _: numbers.append(number)) for each in signals.SIGNALS[::2]}
    yield numbers
    for each, handler in before.items():
        signal.signal(each, handler)


def test_another_s_handlers_get_every_signal_once_all_is_saved(given):
    with signals.raise_on_signal(), pytest.raises(signals.Preempted) as stopped, signals.defer_signals() as signalled:
        for each in signals.SIGNALS[::2]:
            os.kill(os.getpid(), each)
        assert signalled() == "SIGTERM" and given == []
        raise signals.Preempted
    signals.forward(stopped.value)
    assert given == [signal.SIGTERM, signal.SIGUSR2]


def test_a_signal_that_nobody_else_handles_stays_a_stop(given):
    with signals.raise_on_signal():
        with pytest.raises(signals.Preempted) as stopped, signals.defer_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            raise signals.Preempted
        with pytest.raises(signals.Preempted):
            signals.forward(stopped.value)
    assert given == []
