"""Where the kernels of the CPU are kept between processes, and that they need no such place. What they compute is in
tests/quant/test_kernels.py."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch
from numba.core import caching

from qat.quant.kernels import cpu
from tests.conftest import ROOT, THREADS


@pytest.mark.parametrize(
    ("variable", "writable", "wanted"),
    [
        ("", True, "hif8/numba"),
        ("{tmp}/mine", True, "mine"),
        ("", False, None),
        ("/dev/null/x", False, None),
    ],
)
def test_kernels_are_kept_where_there_is_a_place(tmp_path, monkeypatch, variable, writable, wanted):
    """writable: the cache and the folder of the code."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", variable.format(tmp=tmp_path))
    monkeypatch.setenv("HIF8_CACHE", str(tmp_path / "hif8") if writable else "/dev/null/x")
    if not writable:
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    kernels = runpy.run_path(cpu.__file__)
    place = kernels["_decode"].stats.cache_path
    assert place is None if wanted is None else Path(place).parent == tmp_path / wanted
    assert kernels["_KERNELS"].keys() == cpu._KERNELS.keys()


def double(x):
    return 2 * x


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


@pytest.fixture(autouse=True)
def numba_has_read_the_environment():
    """Read Numba's variables now: the next compilation would, if another test has changed one."""
    numba.config.reload_config()


@pytest.mark.filterwarnings("ignore")  # there is nothing to do in parallel
def test_kernels_are_compiled_again_where_their_cache_is_damaged_or_full(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    hits = []
    for damage in (None, None, emptied, cut, Path.unlink, None):
        for file in tmp_path.glob("*/*") if damage else ():
            damage(file)
        kernel = cpu._kernel(double)
        assert kernel(3) == 6
        hits.append(sum(kernel.stats.cache_hits.values()))
    assert hits == [0, 1, 0, 0, 0, 1]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    kernel = cpu._kernel(double)
    assert kernel(1.5) == 3.0


def test_kernels_use_the_threads_of_torch():
    cpu.decode(torch.zeros(10**5, dtype=torch.uint8), torch.float32)
    assert numba.get_num_threads() == torch.get_num_threads() == THREADS


def test_kernels_round_alike_on_several_threads():
    """The fused kernels' tests again in a process that has four threads: Numba reads that while it is imported."""
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "not gpu", "-p", "no:cacheprovider"]
    command += ["-k", "fused or threads_of_torch", "tests/quant/test_kernels.py", "tests/quant/test_kernels_cpu.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["HIF8_TEST_THREADS"] = "4"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 18
