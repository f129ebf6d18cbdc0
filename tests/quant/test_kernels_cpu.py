"""Where the kernels of the CPU are kept between processes, and that they need no such place. What they compute is in
tests/quant/test_kernels.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import numba
import pytest
from numba.core import caching

from qat.quant.kernels import cpu


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
