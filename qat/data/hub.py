"""Read from the Hugging Face hub through outages: wait and print so, end hanging requests, refuse final errors at once.

Three layers retry by themselves: the hub's client after broken connections (five quick tries), the same client after
status codes (it sleeps silently as long as the server says) and `datasets` (20 tries, up to a minute apart). The last
two are turned off here, so that `retry` alone decides how long to wait.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
import pyarrow
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status
from huggingface_hub.utils import logging as hub_logging

from qat.config import DataConfig
from qat.errors import UserError, first_line

FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0  # seconds between two tries: doubled each time, and jittered
SILENCE = 30.0  # seconds without a byte after which a request fails; the hub's client would wait for ever
_UNAVAILABLE = (408, 429, 500, 502, 503, 504)
_FINAL = (401, 403, 404)
_Result = TypeVar("_Result")
_reached = threading.Event()  # set once this process has read from a hub: the machine is not offline


@functools.cache
def prepare() -> None:
    """Give this process's hub client time limits, and let it raise at once when the hub cannot serve a data set."""
    import datasets

    config = datasets.config
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    hub_logging.set_verbosity_error()

    def limit_time(request: httpx.Request) -> None:
        limits = request.extensions["timeout"]  # None means to wait for ever; the listing of files asks for that
        request.extensions["timeout"] = {kind: limit or SILENCE for kind, limit in limits.items()}

    def raise_outage(response: httpx.Response) -> None:
        if response.status_code in _UNAVAILABLE and "/datasets/" in response.url.path:
            response.read()
            hf_raise_for_status(response)

    offline_hooks = get_session().event_hooks["request"]  # the client's own: they refuse in offline mode
    hooks = {"request": [*offline_hooks, limit_time], "response": [raise_outage]}
    set_client_factory(lambda: httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=SILENCE))


def retry(attempt: Callable[[], _Result], cfg: DataConfig, what: str) -> _Result:
    """Return attempt(), repeated for up to `data.retry_hours` while the hub cannot be reached.

    Errors: UserError, at once when waiting would not help, as on a machine that has never reached the hub; OSError of a
    local file.
    """
    start = None  # of the outage
    wait = FIRST_WAIT
    while True:
        try:
            result = attempt()
        except (OSError, ValueError, TypeError, httpx.HTTPError) as error:
            if getattr(error, "filename", None):  # an error of a local file, such as a full disk
                raise
            if _is_final(error):
                raise unusable(cfg, error) from error
            reason = _reason(error)
            start = start or time.monotonic()
            left = start + 3600 * cfg.retry_hours - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"{cfg.named}: {what} could not be read for {cfg.retry_hours:g} hours ({reason}); the "
                    f"same command continues from the last checkpoint"
                ) from error
            pause = min(max(wait * random.uniform(0.5, 1), _retry_after(error)), left)
            again = time.strftime("%H:%M:%S", time.localtime(time.time() + pause))
            print(f"\nwarning: {cfg.path}: {what} could not be read ({reason}); next try at {again}", flush=True)
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)
        else:
            _reached.set()
            if start:
                print(f"\n{cfg.path}: {what} is read, after {time.monotonic() - start:.0f} s", flush=True)
            return result


def unusable(cfg: DataConfig, error: Exception) -> UserError:
    """Return the error for a data set that cannot be used, however long one waits."""
    return UserError(f"{cfg.named}: cannot be streamed ({_reason(error)}); or use {cfg.group}={cfg.packaged}")


def _is_final(error: Exception) -> bool:
    """Return whether the same request would always fail."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _FINAL
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return not _reached.is_set()
    if isinstance(error, pyarrow.ArrowInvalid):  # a ValueError, raised too when only a part of a file arrived
        return False
    return isinstance(error, (ValueError, TypeError, FileNotFoundError, OfflineModeIsEnabled))


def _reason(error: Exception) -> str:
    return first_line(error.__cause__ or error)  # `datasets` itself says "Server Disconnected" whatever happened


def _retry_after(error: Exception) -> float:
    """Return the seconds that the server asks to wait."""
    header = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(header) if header.isdigit() else 0.0
