"""Waiting for a hub: what is waited for and how long, and what is said at once."""

from __future__ import annotations

import errno
import threading
import time

import httpx
import pytest
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError

from qat.config import DataConfig
from qat.data import hub, streaming
from qat.errors import UserError


def refusal(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx.Request("GET", "http://hub")
    return HfHubHTTPError("no", response=httpx.Response(status, headers=headers, request=request))


def tries(monkeypatch, *errors: Exception, hours: float = 1.0) -> list[float]:
    """Return the pauses that `retry` makes when attempts end with these errors before one succeeds."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "read"

    cfg = DataConfig(name="fineweb", source="hub", path="a/corpus", retry_hours=hours)
    assert hub.retry(attempt, cfg, "it") == "read"
    return pauses


def test_an_outage_of_any_data_set_is_raised_at_once():
    """The client itself would sleep through them in silence; models are left to it."""
    names = ("a/corpus", "another/probe")
    for name in names:
        streaming.ParquetFiles(DataConfig(name="streamed", source="hub", path=name), seed=0)
    after = get_session().event_hooks["response"][-1]
    for path in ("api/datasets/{}/tree/main", "datasets/{}/resolve/main/0.parquet"):
        for name in names:
            request = httpx.Request("GET", f"http://hub/{path.format(name)}")
            with pytest.raises(HfHubHTTPError):
                after(httpx.Response(503, request=request))
    after(httpx.Response(503, request=httpx.Request("GET", "http://hub/api/models/a/model")))


def test_pauses_double_to_five_minutes_and_are_as_long_as_the_server_asks(monkeypatch):
    pauses = tries(monkeypatch, *[refusal(503)] * 12)
    assert all(2**n <= pause <= 2 ** (n + 1) for n, pause in enumerate(pauses[:7]))
    assert all(150 <= pause <= 300 for pause in pauses[8:]) and len(pauses) == 12
    assert tries(monkeypatch, refusal(429, **{"Retry-After": "77"})) == [77]


def test_a_full_disk_is_no_outage(monkeypatch):
    with pytest.raises(OSError, match="No space left on device"):
        tries(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "tokens.npz"))


def test_a_machine_that_never_reached_the_hub_is_offline_and_another_waits(monkeypatch):
    monkeypatch.setattr(hub, "_reached", threading.Event())
    with pytest.raises(UserError, match=r"cannot be streamed \(no such host\); or use data=embedded"):
        tries(monkeypatch, httpx.ConnectError("no such host"))
    assert len(tries(monkeypatch, httpx.ReadTimeout("silence"))) == 1
    assert len(tries(monkeypatch, httpx.ConnectError("no such host"))) == 1
