"""What the user can mend: errors of one line, and the valid name nearest to a wrong one."""

from __future__ import annotations

import difflib


class UserError(Exception):
    """Something the user can mend. The message is one line that says what is wrong and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or where it has none its type."""
    return str(error).strip().split("\n")[0].rstrip() or type(error).__name__


def nearest(value: str, choices) -> str:
    """The choice spelled most like `value`, or all of them when none is close."""
    close = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(choices)}"
