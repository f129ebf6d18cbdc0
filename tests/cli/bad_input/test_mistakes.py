"""Malformed input of every kind: each is answered with one line and exit code 2, and nothing is written or damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra.types import RunMode

from tests.cli.bad_input import checkpoints, folders, mistakes, sources, words
from tests.cli.bad_input.mistakes import World

CASES = [*words.CASES, *checkpoints.CASES, *folders.CASES, *sources.CASES]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> World:
    """Return what the mistakes are made in, built once and copied for each."""
    return mistakes.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch):
    """Hydra composes twice, the first time to see whether the configuration asks for a sweep."""
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_is_answered_in_one_line_and_harms_nothing(case, template, main, tmp_path, monkeypatch):
    world = World(tmp_path)
    if case not in words.CASES:  # these need no world
        shutil.copytree(template.path, tmp_path, dirs_exist_ok=True)
    if case.prepare:
        case.prepare(world)
    for name, value in (case.env or {}).items():
        monkeypatch.setenv(name, value)
    given = case.words.replace("{run}", f"runs/{world.done.id}" if "{run}" in case.words else "")
    before = snapshot(tmp_path)
    code, _, stderr = main(f"{case.script}.py", *given.split(" "))
    *bars, line = stderr.removesuffix("\n").split("\n")
    assert code == 2 and all("step/s" in bar for bar in bars), stderr
    assert line.startswith("error: ") and case.wanted in line and len(line) < 500
    after = snapshot(tmp_path)
    if case.began:
        begun(tmp_path, before, after, line.removeprefix("error: "))
    else:
        assert after == before


def snapshot(folder: Path) -> dict[str, str]:
    """Return what a folder holds: relative path -> hash of the content."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in paths
    }


def begun(folder: Path, before: dict[str, str], after: dict[str, str], reason: str) -> None:
    """One run folder says that it failed and why; of what was there, nothing else changed."""
    changed = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys()
    (run,) = {Path(*Path(name).parts[:2]) for name in changed if name != "runs"}
    status = json.loads((folder / run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", reason)
    assert {name for name in changed if name in before} <= {f"{run}/status.json", f"{run}/environment.json"}
