"""Running a model from a block on: the same logits, bit for bit, for less work."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qat.models.blocks import recorded, replayed
from qat.models.load import transformer_blocks
from tests.models.test_families import FAMILIES, SIZES


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pass_from_a_block_on_equals_the_whole_pass(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | FAMILIES[kind][0])).eval()
    blocks, tokens = transformer_blocks(model), torch.arange(60).view(2, 30)
    with recorded(blocks) as outputs:
        whole = logits(model, tokens)
    assert len(outputs) == len(blocks) == 3
    computed = []
    for block in blocks:
        block.mlp.register_forward_hook(lambda module, *_: computed.append(module))
    for first in range(len(blocks) + 1):
        computed.clear()
        with replayed(blocks[:first], outputs[:first]):
            assert torch.equal(logits(model, tokens), whole)
        assert len(computed) == len(blocks) - first
    assert len(outputs) == len(blocks) and all("forward" not in vars(block) for block in blocks)
    assert not torch.equal(logits(model, tokens + 1), whole)
