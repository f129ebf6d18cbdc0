"""The step compiled for a GPU that is not there: every variant, and what production must not notice of it."""

from __future__ import annotations

import functools

import pytest
import torch

from qat.cli import entry
from qat.cli.validate import validate
from qat.errors import UserError
from qat.tools.gpu_dry import table
from tests.conftest import composed
from tests.project.test_floors import imports, inside


@functools.cache
def traced(name: str) -> dict:
    return dict(table.traces([name]))[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", table.VARIANTS)
def test_a_step_compiles_to_one_graph_for_a_gpu_that_is_not_there(name):
    """Minutes: a graph break, a read on the host or a kernel that does not compile would stop it."""
    facts = traced(name)
    assert facts["graphs"] == (2 if "apart" in name else 1)
    assert facts["launches"] >= facts["kernels"] > 0 and facts["registers"] <= 255
    if name in table._NOT_INTERPRETED:
        assert facts["difference"] is None
    else:
        assert facts["difference"] < 1e-4


@pytest.mark.slow
def test_kernels_do_not_multiply_with_blocks():
    small, large = traced("max"), traced("max, 4 blocks")
    assert large["kernels"] == small["kernels"]
    assert table.launches_a_block({"max": small, "max, 4 blocks": large}) <= table.LAUNCHES_A_BLOCK


def test_every_variant_is_a_valid_configuration():
    configs = [entry.typed_config(composed(*table._BASE.split(), *words.split())) for words in table.VARIANTS.values()]
    for cfg in configs:
        validate(cfg)
    assert len({repr(cfg) for cfg in configs}) == len(table.VARIANTS)


def test_nothing_pretends_by_accident():
    answers = torch.cuda.is_available
    from qat.tools.gpu_dry import pretend, trace

    assert pretend and trace and torch.cuda.is_available is answers
    users = {module for module, name in imports() if inside(name, "tools.gpu_dry")}
    assert all(inside(module, "tools.gpu_dry") for module in users)


def test_the_page_has_every_variant_without_a_break():
    section = table._SECTION.search(table.PAGE.read_text())[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line][2:]
    assert {row[0]: row[1] for row in rows} == {name: "2" if "apart" in name else "1" for name in table.VARIANTS}


def test_an_unknown_variant_and_a_missing_compiler_end_in_a_line(monkeypatch):
    with pytest.raises(UserError, match=r"maxx: unknown variant; .*max"):
        table.check(["maxx"])
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="Triton and g"):
        table.check(["max"])
