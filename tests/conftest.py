"""One thread, no network, no launcher, a cache of the session's own, configurations composed from the real conf/."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import random
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before torch, Numba, transformers or wandb are imported.
os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = os.environ.setdefault("HIF8_TEST_THREADS", "1")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Compiled kernels outlive a session, whose cache does not.
os.environ.setdefault(
    "NUMBA_CACHE_DIR", str(Path(__file__).resolve().parents[1] / "qat" / "quant" / "kernels" / "__pycache__")
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest

ROOT = Path(__file__).resolve().parents[1]
THREADS = int(os.environ["HIF8_TEST_THREADS"])
RUNS = "runs_dir"  # the key of Config that names the folder of run folders
TINY = ("model=tiny", "budget=smoke", "logger=local")
_USER_CACHE = os.environ.get("HIF8_CACHE")


@contextlib.contextmanager
def composing(conf: Path = ROOT / "conf"):
    """Let Hydra compose the schema and this folder."""
    from hydra import initialize_config_dir

    from qat.config import register

    register()
    with initialize_config_dir(str(conf), version_base="1.3"):
        yield


@functools.cache
def composed(*words: str):
    """conf/train.yaml under command-line words, as the DictConfig that a script gets."""
    from hydra import compose

    with composing():
        return compose("train", list(words))


def options(group: str) -> list[str]:
    """The files of a folder of conf/, without .yaml."""
    return sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))


def typed(runs: Path, /, *words: str, **dotted):
    """A validated Config of `words`, its runs in the folder `runs`; keys of `dotted` are set afterwards."""
    from qat.cli import entry
    from qat.cli.validate import validate
    from qat.utils import device

    cfg = entry.typed_config(composed(*words))
    device.round_sums_once()  # as every process that computes
    for key, value in {RUNS: str(runs), **dotted}.items():
        *groups, name = key.split(".")
        node = functools.reduce(getattr, groups, cfg)
        assert hasattr(node, name), key
        setattr(node, name, value)
    validate(cfg)
    return cfg


def script(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run scripts/<name> in a fresh interpreter, in another folder than the repository."""
    command = [sys.executable, str(ROOT / "scripts" / name), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Return once the condition holds, or raise."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wandb_records(path: Path) -> list[list[dict]]:
    """The records of every W&B run in the run folder `path`, oldest first, by W&B's own reader."""
    files = sorted((path / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    read = [subprocess.run([*command, str(file)], capture_output=True, text=True, check=True) for file in files]
    return [[json.loads(line) for line in each.stdout.splitlines()] for each in read]


def pytest_configure(config):
    """Tests run on the CPU, save for those that are asked for with `-m gpu`, and are ranks of no launcher."""
    for name in list(os.environ):
        if re.match("WORLD_SIZE|(LOCAL_)?RANK$|MASTER_|SLURM_|HIF8_REQUEUE", name):
            del os.environ[name]
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it while it is imported


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one in the end."""
    longest = ("distributed", "compile", "streaming", "loop", "sweep", "faults", "evaluate", "archive", "bench")
    order = {f"test_{name}": number for number, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@atexit.register
def _let_triton_end_in_silence():
    """Keep the C++ side of torch.compile from filling pages with what it did not free."""
    if "triton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory):
    import torch

    torch.set_num_threads(THREADS)
    gc.freeze()  # what the imports left is not searched for garbage again and again
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"  # shared by all workers
    os.environ["HIF8_CACHE"] = str(cache)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def arithmetic(request):
    """Set what `budget.arithmetic=auto` is in these tests and the processes they start, whatever the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIF8_ARITHMETIC", request.param)
        yield request.param


@pytest.fixture
def user_cache(monkeypatch):
    """The cache that the user's own runs use: SmolLM2 is converted once for all sessions."""
    if _USER_CACHE is None:
        monkeypatch.delenv("HIF8_CACHE")
    else:
        monkeypatch.setenv("HIF8_CACHE", _USER_CACHE)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of 24 small text files, each file one document; two of them are held out."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(200)]
    for number in range(24):
        text = "\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(4))
        (folder / f"{number:02}.txt").write_text(f"Document {number}. {text}")
    return folder


@pytest.fixture(scope="session")
def configure(texts):
    """configure(runs folder, *words, **dotted keys): a Config of the tiny model, smoke budget and the small texts."""

    def make(runs: Path, /, *words: str, **dotted):
        return typed(runs, *TINY, *words, **{"data.source": "files", "data.path": str(texts), **dotted})

    return make


@pytest.fixture(scope="session")
def scored(configure, tmp_path_factory):
    """(configuration of a run that was trained and scored, its comparison, its checkpoint's files before scoring)"""
    from tests.helpers.scored import train_and_score

    return train_and_score(configure, tmp_path_factory.mktemp("scored"))


@pytest.fixture
def config(configure, tmp_path):
    """`configure` with its runs in tmp_path/runs."""
    return functools.partial(configure, tmp_path / "runs")


@pytest.fixture
def main(monkeypatch, tmp_path, capfd):
    """main(name, *words): scripts/<name> run as the main program of this interpreter, in tmp_path; (exit code, stdout,
    stderr)."""

    def run(name: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / name), *words])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the script sets it: put back afterwards
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(ROOT))
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
        return code, *capfd.readouterr()

    return run
