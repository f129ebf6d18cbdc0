"""A world to make mistakes in: built once, copied for each."""

import shutil

import pytest
from hydra._internal.hydra import Hydra
from hydra.types import RunMode

pytest.register_assert_rewrite("tests.bad_input.mistakes")
from tests.bad_input import mistakes  # noqa: E402
from tests.bad_input.mistakes import World  # noqa: E402


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> World:
    return mistakes.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(template, tmp_path) -> World:
    shutil.copytree(template.path, tmp_path, dirs_exist_ok=True)
    return World(tmp_path)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch):
    """Hydra composes twice, the first time to see whether the configuration asks for a sweep."""
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)
