"""What a run folder says of the machine and the code; tests of the rest of qat/utils/environment.py are where it is
used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pwd
import subprocess

import pytest
import torch
from hydra import compose

from qat.cli import entry
from qat.config import DataConfig, ModelConfig
from qat.data import heldout, packing
from qat.errors import UserError
from qat.models import load
from qat.runs.identity import run_id
from qat.tools.plan.machine import needs_hub
from qat.utils import environment
from tests.conftest import TINY, composed, composing

IDENTITY = ["-c", "user.name=tester", "-c", "user.email=tester@localhost"]


def test_the_environment_has_every_package_and_nothing_of_the_user(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    found = environment.describe_environment()
    assert found["installed"]["torch"] == found["packages"]["torch"] == importlib.metadata.version("torch")
    assert {"hydra-core", "safetensors", "pytest"} <= found["installed"].keys()
    assert any("PyTorch built with" in line for line in found["build"])
    assert "a secret" not in json.dumps(found)


def test_a_job_of_slurm_names_itself_and_its_nodes(monkeypatch):
    assert environment.describe_environment()["slurm"] == {}
    for name, value in {"JOB_ID": "12", "JOB_NODELIST": "gpu[1-2]", "JOB_USER": "somebody"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert environment.describe_environment()["slurm"] == {"job_id": "12", "job_nodelist": "gpu[1-2]"}


def test_hardware_and_code_are_named_in_one_way():
    found = environment.describe_environment() | {"gpu": None, "processor": "Some CPU", "cores": 2}
    assert environment.hardware_name(found) == "Some CPU, 2 cores"
    assert environment.hardware_name(found | {"gpu": "NVIDIA H200"}) == "NVIDIA H200"
    assert (
        environment.commit_name(None) == "unknown"
        and environment.commit_name({"commit": "0123", "modified": False}) == "0123"
    )
    assert environment.commit_name({"commit": "0123", "modified": True, "diff": "f"}) == "0123, modified"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """git(*words) in a new repository of one file, committed, that stands for ours."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # the user's

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *IDENTITY, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert environment.describe_environment()["git"] is None
    git("init")
    (tmp_path / "code.py").write_text("one\n")
    git("add", ".")
    git("commit", "-m", "first")
    return git


def test_uncommitted_changes_have_a_hash(repository, tmp_path):
    def state() -> dict:
        return environment.describe_environment()["git"]

    commit = repository("rev-parse", "HEAD").strip()
    assert state() == {"commit": commit, "modified": False, "diff": None}
    hashes = []
    for text in ("two\n", "three\n", "two\n"):
        (tmp_path / "code.py").write_text(text)
        hashes.append(state()["diff"])
    assert state()["modified"] and hashes[0] == hashes[2] != hashes[1] and None not in hashes


def test_a_git_that_hangs_is_not_waited_for(monkeypatch):
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert environment.describe_environment()["git"] is None


def test_a_gpu_is_described_whole(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("580.65.06\n")
    monkeypatch.setattr(environment, "_DRIVER", tmp_path / "version")
    assert set(environment._gpus().values()) == {None}
    card = type("Card", (), {"total_memory": 141 * 10**9})
    answers = {"is_available": True, "get_device_name": "NVIDIA H200", "device_count": 8, "get_device_properties": card}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert environment._gpus() == {
        "gpu": "NVIDIA H200", "gpus": 8, "gpu_memory": 141 * 10**9, "driver": "580.65.06", "cuda": "13.0",
        "cudnn": 91002, "nccl": "2.28.9",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- folders of the user's


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home folder, and no variable that names a cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HIF8_CACHE")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def homeless(home, monkeypatch):
    """No HOME, and a user whom the system does not know."""

    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, ".cache/hif8-qat"),
        ({"HIF8_CACHE": "~/c"}, "c"),
        ({"HIF8_CACHE": ""}, ".cache/hif8-qat"),
        ({"HIF8_CACHE": " "}, ".cache/hif8-qat"),
        ({"XDG_CACHE_HOME": ""}, ".cache/hif8-qat"),
        ({"XDG_CACHE_HOME": "relative"}, ".cache/hif8-qat"),
        ({"XDG_CACHE_HOME": "/tmp"}, "/tmp/hif8-qat"),
    ],
    ids=str,
)
def test_the_cache_is_where_its_variables_say(home, monkeypatch, variables, wanted):
    monkeypatch.setattr(environment.Path, "mkdir", lambda *_, **__: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.cache_dir() == home / wanted


def test_without_a_home_folder_the_fix_is_named(homeless, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"^~/\.cache/hif8-qat: cannot be a cache \([^\n]+\); set HIF8_CACHE"):
        environment.cache_dir()
    with pytest.raises(UserError, match=r"^~/r: the home folder is not known; set HOME, or write the path in full$"):
        entry.typed_config(composed(*TINY, 'runs_dir="~/r"'))
    monkeypatch.setenv("HIF8_CACHE", str(tmp_path / "c"))
    assert environment.cache_dir() == tmp_path / "c"


def test_every_folder_and_file_of_the_command_line_may_be_in_the_home_folder(home):
    keys = ["runs_dir", "run", "record", "report.out", "bench.out", "export.out", "dashboard.out"]
    words = [*TINY, *(f'{key}="~/{key}"' for key in keys), 'runs=["~/a",b]']
    cfg = entry.typed_config(composed(*words))
    for key in keys:
        *group, name = key.split(".")
        assert getattr(getattr(cfg, group[0]) if group else cfg, name) == str(home / key)
    assert cfg.runs == [str(home / "a"), "b"]
    with composing():
        sweep = compose("train", words, return_hydra_config=True).hydra.sweep.dir
    assert sweep.startswith(f"{home}/runs_dir/.sweep/")


def test_models_and_texts_in_the_home_folder_are_read_there_and_named_as_written(home, texts, monkeypatch):
    home.mkdir()
    (home / "texts").symlink_to(texts)
    here = DataConfig(name="own", source="files", path="~/texts")
    there = DataConfig(name="own", source="files", path=str(texts))
    assert list(packing.open_corpus(here, 0).heldout()) == list(packing.open_corpus(there, 0).heldout())
    assert packing.open_corpus(DataConfig(name="own", source="hub", path="~/texts"), 0).local
    assert load._locate(ModelConfig(name="own", source="hub", path="~/texts")) == (home / "texts", {})
    words = [*TINY, "model=hub", 'model.path="~/texts"', "data.source=files", "validation=none"]
    written, full = (entry.typed_config(composed(*words, f'data.path="{path}"')) for path in ("~/texts", texts))
    assert (written.model.path, written.data.path) == ("~/texts", "~/texts") and not needs_hub(written)
    assert run_id(written) != run_id(full)
    monkeypatch.setattr(heldout.wikipedia, "openings", lambda path: iter([str(path)]))
    assert list(heldout._documents(DataConfig(name="own", source="files", path="~/wiki.bz2"))) == [f"{home}/wiki.bz2"]
