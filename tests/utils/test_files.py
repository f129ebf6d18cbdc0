"""What is written whole or not at all; locks are tested with the runs that take them (tests/runs/test_folder.py)."""

from __future__ import annotations

import errno
import os

import pytest

from qat.utils import files


@pytest.mark.parametrize("content", ["täxt", b"\x00\xff"])
def test_what_a_full_disk_took_of_a_file_is_taken_away_again(tmp_path, monkeypatch, content):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, whole = tmp_path / "one", content if isinstance(content, bytes) else content.encode()
    files.replace(path, content)
    assert path.read_bytes() == whole
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        files.replace(path, "other")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == whole


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'[{"id": 1}', b"\xff\xfe", b'[{"id": 1}]'])
def test_what_a_cache_holds_is_read_or_made_again(tmp_path, capsys, content):
    path = tmp_path / "cached.json"
    if content is not None:
        path.write_bytes(content)
    whole = content == b'[{"id": 1}]'
    assert files.cached_json(path) == ([{"id": 1}] if whole else None)
    warning = "" if whole or content is None else f"warning: {path} is damaged and made again\n"
    assert capsys.readouterr().out == warning
