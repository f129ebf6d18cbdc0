"""The communication model against what gloo's ranks send."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from qat.models.load import load_config
from qat.tools import flops
from qat.tools.plan import communication
from qat.tools.plan.communication import Traffic
from tests.conftest import typed
from tests.helpers import traffic
from tests.helpers.on_ranks import run_module


@pytest.fixture(scope="module")
def sent(texts, tmp_path_factory):
    """sent(parallel, ranks): the collectives of a step that ranks really made; all of them run once."""
    folder = tmp_path_factory.mktemp("traffic")
    run_module("traffic", texts, folder)
    return lambda parallel, ranks: json.loads((folder / f"{parallel}.{ranks}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", traffic.RANKS)
@pytest.mark.parametrize("parallel", traffic.PARALLEL)
def test_counts_and_sizes_are_those_of_real_steps(sent, parallel, ranks, tmp_path):
    cfg = typed(tmp_path, *traffic.WORDS, **{"budget.parallel": parallel, "data.path": "texts"})
    shape, _ = flops.model_shape(load_config(cfg.model), cfg)
    calls, size = Counter(), Counter()
    for each in communication.of_step(shape, cfg, ranks, calls=cfg.batch[1] // ranks):
        calls[each.operation] += each.calls
        size[each.operation] += each.size
    made, bytes_made = Counter(), Counter()
    for operation, elements in sent(parallel, ranks):
        made[operation] += 1
        bytes_made[operation] += 4 * elements
    assert made == calls and bool(made) == (ranks > 1)
    # FSDP fills up what it cannot share evenly, here the 257 rows of the embedding.
    assert dict(bytes_made) == pytest.approx(dict(size), rel=0.02 if parallel == "fsdp" else 0)


def test_rings_send_what_textbooks_say():
    whole = 8e9
    assert Traffic("all_reduce", 1, whole).sent(4) == 2 * 3 / 4 * whole
    assert Traffic("all_gather", 1, whole).sent(4) == Traffic("reduce_scatter", 1, whole).sent(4) == 3 / 4 * whole
    assert Traffic("broadcast", 1, whole).sent(4) == whole
