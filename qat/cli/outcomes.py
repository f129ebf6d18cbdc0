"""What became of each of many runs: one table, and one exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydra.errors import HydraException

from qat.errors import UserError
from qat.utils.signals import REQUEUE


@dataclass
class Outcome:
    """Hold what became of a run. state: done, failed, preempted, stopped or not begun."""

    name: str
    state: str
    reason: str = ""


def attempt(name: str, work: Callable[[], object]) -> tuple[Outcome, Exception | None]:
    """Do `work`; returns its outcome and what it raised. Signals and Ctrl-C pass."""
    try:
        work()
    except UserError as error:
        return Outcome(name, "failed", str(error)), error
    except OSError as error:  # a full disk, no permission
        return Outcome(name, "failed", explain_error(error)), error
    except Exception as error:  # a defect of ours, to be seen whole
        traceback.print_exc()
        return Outcome(name, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:400]), error
    return Outcome(name, "done"), None


def print_table(outcomes: Sequence[Outcome], title: str) -> None:
    """Print a row a run under a title."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    print(f"\n{title}")
    for outcome in outcomes:
        print(f"  {outcome.state:<9}  {outcome.name:<{width}}  {outcome.reason}".rstrip())
    sys.stdout.flush()


def summarize(outcomes: Sequence[Outcome]) -> tuple[int, str]:
    """Return the exit code and the last line: 2 when a run failed, else REQUEUE when one was preempted, else 0."""
    states = [outcome.state for outcome in outcomes]
    for state, code in (("failed", 2), ("preempted", REQUEUE)):
        if state in states:
            count = f"{states.count(state)} of {len(states)} runs"
            return code, f"{count} {state}; the same command runs only what is missing"
    return 0, ""


def explain_error(error: Exception) -> str:
    """Return in one line what Hydra, OmegaConf, the YAML reader or the system says."""
    mark = getattr(error, "problem_mark", None)
    if mark:
        return f"{mark.name}, line {mark.line + 1}: not YAML ({error.problem}); mind indentation, colons and brackets"
    if isinstance(error, UnicodeDecodeError):
        return f"a file of the configuration is not text in UTF-8 ({error}); write it anew"
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # a full disk, no permission
        return f"{error.filename or 'system'}: {error.strerror or error}"
    message = " ".join(str(cause) for cause in (error, error.__cause__) if cause)
    return " ".join(message.partition("Config search path:")[0].split())[:400]
