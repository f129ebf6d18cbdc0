"""The communication model against what gloo's ranks send, and its times against arithmetic by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from qat.models.load import load_config
from qat.tools import flops
from qat.tools.plan import communication, plan
from qat.tools.plan.communication import Traffic
from qat.tools.plan.page import page
from tests.conftest import typed
from tests.helpers import traffic
from tests.helpers.on_ranks import run_module
from tests.tools.test_plan import CPU, PANGU


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


def test_more_gpus_than_a_node_has_wait_for_the_network(tmp_path):
    cfg = typed(tmp_path, *PANGU)
    made = plan.make(cfg, 8, CPU, on_gpus=True)
    ddp = {gpus: communication.of_step(made.shape, cfg, gpus, calls=8) for gpus in (1, 8, 16)}
    cfg.budget.parallel = "fsdp"
    fsdp = communication.of_step(made.shape, cfg, 16, calls=8)
    assert communication.efficiency(2.0, ddp[1], 1) == 1.0
    gradients = 2 * 15 / 16 * 4 * made.shape.parameters / 50e9
    assert communication.seconds(ddp[16], 16) == pytest.approx(gradients, rel=0.1)
    shares = [communication.efficiency(2.0, each, gpus) for each, gpus in ((ddp[8], 8), (ddp[16], 16), (fsdp, 16))]
    assert 1 > shares[0] > 0.95 > shares[1] > shares[2] > 0.5
    said = " ".join(page(made).split())
    assert "more GPUs, each with 131,072 tokens a step as here, budget.parallel=fsdp" in said
    assert "64 GPUs" in said and "ASSUMED: 450 GB/s a GPU among 8 of a node" in said
    assert "more GPUs" not in page(plan.make(cfg, 1, CPU, on_gpus=False))
