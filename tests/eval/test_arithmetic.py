"""In what arithmetic models are scored: training's with FP32 logits, or an export's."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qat.eval import arithmetic
from qat.utils import device


@pytest.mark.parametrize(
    ("wanted", "processor", "name"),
    [
        ("training", "bf16", "training"),
        ("export", "bf16", "export"),
        ("training", "fp32", "fp32"),
        ("export", "fp32", "fp32"),
    ],
)
def test_arithmetic_is_named(configure, tmp_path, wanted, processor, name):
    cfg = configure(tmp_path, f"benchmark.arithmetic={wanted}", f"budget.arithmetic={processor}")
    assert arithmetic.name(cfg) == name


@pytest.fixture
def model():
    """A random model, whose parameters BF16 cannot hold, with a head that shares the embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=200, tie_word_embeddings=True)).eval()


def tokens():
    return torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(0))


def test_training_is_the_forward_pass_of_training(model):
    """The same parameters, rounded, under autocast: the hidden states are training's bit for bit, logits are FP32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        with device.autocast("bf16"):
            hidden = model.model(input_ids=tokens()[:, :-1]).last_hidden_state
        exact = torch.nn.functional.linear(hidden.float(), model.lm_head.weight.float())
        arithmetic.store(model, "training")
        model.set_output_embeddings(arithmetic.FP32Head(model.get_output_embeddings()))
        with arithmetic.autocast("training"):
            logits = model(input_ids=tokens()[:, :-1]).logits
    assert hidden.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, exact)


def test_an_export_is_bf16_throughout(model):
    arithmetic.store(model, "export")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad(), arithmetic.autocast("export"):
        assert model(input_ids=tokens()[:, :-1]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["fp32", "training", "export"])
def test_parameters_hold_what_bf16_can(model, how):
    before = {name: parameter.detach().bfloat16().float() for name, parameter in model.named_parameters()}
    arithmetic.store(model, how)
    assert all(torch.equal(parameter.float(), before[name]) for name, parameter in model.named_parameters())
