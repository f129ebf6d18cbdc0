"""The container recipe, as far as that can be read without building it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from tests.conftest import ROOT

RECIPE = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
STEPS = [line.split(maxsplit=1) for line in RECIPE.splitlines() if line and not line.startswith("#")]


def steps(kind: str) -> list[str]:
    return [rest for name, rest in STEPS if name == kind]


def test_what_it_copies_exists_and_is_what_git_has():
    copied = [word for rest in steps("COPY") for word in rest.split()[1:-1]]
    assert copied[-1] == "." and all((ROOT / each).exists() for each in copied)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert sorted(each.removeprefix("**/") for each in ignored) == sorted(
        line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()
    )


def test_its_python_is_one_that_the_project_takes_and_the_tests_run_on():
    (base,) = steps("FROM")
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", base).groups()))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert version >= tuple(map(int, wanted.removeprefix(">=").split("."))) and version <= sys.version_info[:2]


def test_versions_are_those_of_constraints_txt_and_nothing_else_is_installed():
    """By `make setup`: the recipe itself names no package of Python's, and make installs with the constraints."""
    installs = [part for run in steps("RUN") for part in run.split("&&") if "install" in part or "make" in part]
    assert [part.split()[0] for part in installs] == ["apt-get", "install", "PIP_NO_CACHE_DIR=1"]
    does = subprocess.run(["make", "-n", "-B", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installed = [line for line in does.splitlines() if "pip install" in line and "--upgrade pip" not in line]
    assert installed and all(
        "-c constraints.txt" in line or re.search(r"--no-deps( [\w-]+==[\w.]+)+$", line) for line in installed
    )
    assert len(re.findall(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)) == 1


def test_nobody_is_root_and_what_is_to_last_is_a_volume():
    order = [name for name, _ in STEPS]
    assert steps("USER") == ["qat"] and order.index("USER") < order.index("COPY")
    (volumes,) = steps("VOLUME")
    for folder in re.findall(r'"(.+?)"', volumes):
        assert f" {folder}" in steps("RUN")[0] and f":{folder}" in RECIPE  # made for that user, and in the example
