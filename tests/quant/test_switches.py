"""Rounding only some tensors of a model: both ends are the models that are known, and nothing stays changed."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qat.quant.convert import convert, quantized_linears
from qat.quant.linear import round_weights
from qat.quant.switches import only

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True, initializer_range=0.2)).eval()


def frozen(plain, config, dtype=torch.float32, **quant):
    """A copy in W8A8 whose scales are those of `TOKENS`, weights rounded ahead: (model, bank)."""
    model = copy.deepcopy(plain).to(dtype)
    quant = {f"quant.{key}": value for key, value in {"bf16_blocks": 2, "gradients": False, **quant}.items()}
    cfg = config("scaling=most_recent", **quant)
    cfg.scaling.discard_after_warmup = False  # amaxes are recorded unquantized
    bank, _ = convert(model, cfg)
    logits(model)
    bank.tick()
    bank.freeze()
    round_weights(quantized_linears(model).values(), dtype)
    return model, bank


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def linears(model):
    return list(quantized_linears(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_the_unquantized_model_and_everything_the_quantized_one(plain, config, dtype):
    model, bank = frozen(plain, config, dtype)
    whole = logits(model)
    unquantized = logits(copy.deepcopy(plain).to(dtype))
    with only(linears(model), frozenset()):
        assert torch.equal(logits(model), unquantized)
    with only(linears(model), range(len(bank))):
        assert torch.equal(logits(model), whole)
    assert not torch.equal(whole, unquantized)


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_a_role_alone_is_the_model_that_rounds_no_other(plain, config, role):
    model, bank = frozen(plain, config)
    other = {"weight": "activations", "activation": "weights"}[role]
    wanted, _ = frozen(plain, config, **{other: False})
    active = [index for index, name in enumerate(bank.names) if name.endswith(role)]
    with only(linears(model), active):
        assert torch.equal(logits(model), logits(wanted))


def test_a_block_left_out_is_the_model_that_keeps_it_in_bf16(plain, config):
    model, bank = frozen(plain, config)
    wanted, of_wanted = frozen(plain, config, bf16_also=[1])
    kept = [index for index, name in enumerate(bank.names) if name in of_wanted.names]
    assert 0 < len(kept) < len(bank)
    with only(linears(model), kept):
        assert torch.equal(logits(model), logits(wanted))


def test_a_model_is_left_as_it_was_also_by_an_error(plain, config):
    model, bank = frozen(plain, config)
    before, state = logits(model), {name: value.clone() for name, value in bank.state_dict().items()}
    gate = next(i for i, name in enumerate(bank.names) if name.endswith("up_proj/weight"))
    with pytest.raises(KeyError), only(linears(model), [gate]):
        assert not torch.equal(logits(model), before)
        raise KeyError
    assert all("forward" not in vars(linear) for linear in linears(model))
    assert all(linear.input._source is None and linear.input._rounded is None for linear in linears(model))
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in bank.state_dict().items())
    assert not torch.cat(bank.amaxes).any()
