"""Calibration: what the scales are made of, that one commit makes them, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from qat.data import packing
from qat.eval.subject import CALIBRATION_SEQUENCES, calibration_batches
from qat.models.load import load_model
from qat.quant.calibrate import calibrate
from qat.quant.convert import convert, quantized_linears
from qat.quant.scaling import ScaleBank
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, ptq_of


def converted(cfg):
    """(model with random weights, tokenizer, bank) of the PTQ beside `cfg`."""
    cfg = ptq_of(cfg)
    model, tokenizer = load_model(cfg.model, cfg.seed)
    return model.eval(), tokenizer, convert(model, cfg)[0]


def test_a_ptq_is_the_baseline_but_for_its_quantization(config):
    cfg = config("experiment=exp8", **{"quant.scope": ["mlp.down_proj"]})
    found = ptq_of(cfg)
    assert found.quant == cfg.quant and found.quantized
    assert Run.of(baseline_of(found)).path == Run.of(baseline_of(cfg)).path


@pytest.mark.parametrize(
    "words",
    [("experiment=exp8",), ("experiment=exp5", "budget.micro_batch=3"), ("experiment=exp3", "protocol=released")],
)
def test_scales_are_those_of_the_largest_values_seen_unquantized(config, words):
    """Whatever the run's own scaling: also under `current`, the scale is static."""
    cfg = config(*words)
    model, tokenizer, bank = converted(cfg)
    seen, linears = {}, quantized_linears(model)
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    calibrate(model, bank, calibration_batches(ptq_of(cfg), tokenizer))
    for name, linear in linears.items():
        assert sum(len(x) for x in seen[name]) == CALIBRATION_SEQUENCES
        # Each is another one, also where training repeats its micro-batches.
        assert len(torch.cat(seen[name]).flatten(1).unique(dim=0)) == CALIBRATION_SEQUENCES
        for role, values in (("activation", torch.cat(seen[name])), ("weight", linear.weight)):
            quantizer = linear.quantizers[role]
            wanted = quantizer.target / values.abs().max()
            torch.testing.assert_close(bank.scale[quantizer.index], wanted, rtol=1e-6, atol=0)
            assert bank.scale_of(quantizer.index, 2 * values) == bank.scale[quantizer.index]
    plain = load_model(cfg.model, cfg.seed)[0].eval()
    tokens = packing.training_stream(cfg.data, cfg.seed, tokenizer).micro_batch(cfg.batch[0], cfg.budget.seq_len)[
        :, :-1
    ]
    first = next(iter(linears))
    wanted = []
    plain.get_submodule(first).register_forward_pre_hook(lambda _, inputs: wanted.append(inputs[0]))
    with torch.no_grad():
        plain(input_ids=tokens)
    assert torch.equal(seen[first][0], wanted[0])  # the run's own first batch, through the unquantized model


def test_calibration_commits_once_and_leaves_weights_and_gradients_alone(config, monkeypatch):
    cfg = config("experiment=exp8")
    model, tokenizer, bank = converted(cfg)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    commits, commit = [], ScaleBank.tick
    monkeypatch.setattr(
        ScaleBank, "tick", lambda self, *given, **more: commits.append(1) or commit(self, *given, **more)
    )
    calibrate(model, bank, calibration_batches(ptq_of(cfg), tokenizer))
    assert commits == [1] and not bank.quantizing and not torch.cat(bank.amaxes).any()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    gradients = [linear.quantizers["gradient"].index for linear in quantized_linears(model).values()]
    assert (bank.scale[gradients] == 1).all()  # never seen
    bank.freeze()
    held = {name: value.clone() for name, value in bank.state_dict().items()}
    with torch.no_grad():
        model(input_ids=torch.arange(128).view(2, 64))
    assert (
        all(torch.equal(value, held[name]) for name, value in bank.state_dict().items())
        and not torch.cat(bank.amaxes).any()
    )
