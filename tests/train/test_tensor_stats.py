"""Telemetry: every number against plain Python, and training unchanged by looking at it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from qat.config import Config, QuantConfig, ScalingConfig
from qat.quant.convert import convert
from qat.runs.identity import baseline_of
from qat.train import loop
from qat.train.tensor_stats import TensorStats, UpdateStats

LAYER = "layers.0.mlp.up_proj"
TARGET = 15.0


def linear(overflow: str = "clip", **quant):
    """(model of one quantized linear 12 -> 6, its bank), one step of unit scales behind it."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(12, 6, bias=False)})})])
    settings = {"format": "hif8", "scope": ["mlp.up_proj"], "bf16_blocks": 0, "overflow": overflow} | quant
    cfg = Config(quant=QuantConfig(**settings), scaling=ScalingConfig(algo="most_recent"))
    cfg.budget.steps, cfg.model.name = 10, "toy"
    bank, _ = convert(model, cfg)
    bank.begin_step(1, 1)
    run(model, torch.ones(1, 12), torch.ones(1, 6))
    bank.tick()
    bank.begin_step(2, 1)
    return model, bank


def run(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
    model.layers[0]["mlp"]["up_proj"](x.requires_grad_()).backward(gradient)


def wide(*shape: int, seed: int, low: float = -30, high: float = 4) -> torch.Tensor:
    """Values of all magnitudes from 2^low to 2^high, one of them zero."""
    draw = np.random.default_rng(seed)
    values = draw.choice([-1.0, 1.0], shape) * 2.0 ** draw.uniform(low, high, shape)
    values.flat[0] = 0.0
    return torch.tensor(values, dtype=torch.float32)


def mantissa_bits(size: float) -> int:
    distance = abs(math.floor(math.log2(size)))
    return 3 if distance < 4 else 2 if distance < 8 else 1 if distance < 16 else 0


def hif8(value: float, overflow: str) -> float:
    """HiF8 of one number, from the format's description: to nearest, ties away from zero."""
    size = min(abs(value), TARGET) if overflow == "clip" else abs(value)
    if size < 2**-22:
        rounded = 2**-22 if size >= 2**-23 else 0.0
    else:
        unit = 2.0 ** (math.floor(math.log2(size)) - mantissa_bits(size))
        rounded = math.floor(size / unit + 0.5) * unit
    return math.copysign(rounded, value)


def expected(tensors: list[torch.Tensor], scale: float, overflow: str) -> dict:
    """Return what a row must hold, counted one number at a time."""
    scaled = [float(np.float32(v) * np.float32(scale)) for tensor in tensors for v in tensor.flatten().tolist()]
    scaled = [value for value in scaled if value]
    rounded = [hif8(value, overflow) for value in scaled]
    lost = sum(r == 0 for r in rounded)
    largest = TARGET if overflow == "clip" else math.inf
    tiers = [mantissa_bits(min(abs(v), largest)) for v, r in zip(scaled, rounded, strict=True) if r]
    noise = sum((v - r) ** 2 for v, r in zip(scaled, rounded, strict=True))
    amax = max(tensor.abs().max().item() for tensor in tensors)
    row = {f"tier{bits}": tiers.count(bits) / len(scaled) for bits in (3, 2, 1, 0)}
    row |= {"underflow": lost / len(scaled), "beyond": sum(abs(v) > TARGET for v in scaled) / len(scaled)}
    row["inexact_in_fp8"] = sum(abs(r) > 28 or (abs(r) < 2**-12 and r * 2**13 % 1 != 0) for r in rounded) / len(scaled)
    row |= {"amax": amax, "scale": scale, "overshoot": amax * scale / TARGET}
    return row | {"sqnr_db": 10 * math.log10(sum(v * v for v in scaled) / noise)}


@pytest.mark.parametrize("overflow", ["clip", "inf"])
def test_rows_are_what_counting_by_hand_gives(overflow):
    model, bank = linear(overflow)
    inputs = [wide(5, 12, seed=1), wide(7, 12, seed=2, high=2)]
    gradients = [wide(5, 6, seed=3), wide(7, 6, seed=4)]
    weight = model.layers[0]["mlp"]["up_proj"].weight.detach()
    probe = TensorStats(model)
    with probe.attached():
        for x, gradient in zip(inputs, gradients, strict=True):
            run(model, x, gradient)
    rows = probe.rows(7)
    assert [(row.pop("step"), row.pop("layer"), row["role"]) for row in rows] == [
        (7, LAYER, role) for role in ("activation", "weight", "gradient")
    ]
    tensors = {"activation": inputs, "weight": [weight, weight], "gradient": gradients}
    for index, row in enumerate(rows):
        wanted = expected([t.detach() for t in tensors[row.pop("role")]], bank.scale[index].item(), overflow)
        assert row == pytest.approx(wanted, rel=1e-5)
        assert sum(row[f"tier{bits}"] for bits in range(4)) + row["underflow"] == pytest.approx(1)
    activation = expected([t.detach() for t in inputs], bank.scale[0].item(), overflow)
    # The inputs reach every branch: all tiers, lost values, values beyond the target.
    assert all(activation[f"tier{bits}"] > 0.05 for bits in range(4))
    assert activation["underflow"] > 0.05 and activation["beyond"] > 0.02 and activation["overshoot"] > 4


def test_what_has_no_noise_has_no_ratio():
    model, _ = linear()
    probe = TensorStats(model)
    with probe.attached():
        run(model, torch.ones(1, 12), torch.zeros(1, 6))
    activation, _, gradient = probe.rows(1)
    assert activation["sqnr_db"] is None and activation["tier3"] == 1  # 15 is exact
    assert gradient["sqnr_db"] is None and gradient["amax"] == 0 and gradient["tier3"] == gradient["underflow"] == 0


def test_what_overflows_to_infinity_has_no_ratio():
    """JSON has no infinity."""
    model, _ = linear("inf")
    probe = TensorStats(model)
    with probe.attached():
        run(model, torch.full((1, 12), 2.0**20), torch.ones(1, 6))
    assert probe.rows(1)[0]["sqnr_db"] is None


def test_a_detached_probe_sees_nothing_more():
    model, _ = linear()
    probe = TensorStats(model)
    with pytest.raises(KeyboardInterrupt), probe.attached():
        raise KeyboardInterrupt
    run(model, torch.ones(1, 12), torch.ones(1, 6))
    assert probe.rows(1) == []


# -------------------------------------------------------------------------------------------------------------- updates


def test_updates_are_counted_as_stored_in_bf16_and_on_the_grid():
    model, _ = linear()
    weight = model.layers[0]["mlp"]["up_proj"].weight
    with torch.no_grad():
        weight.fill_(1.0)  # so 1 is scaled to 15, where HiF8's values are 1 apart, and 4 from 16 on
    probe = UpdateStats(model)
    with torch.no_grad():
        weight[0, :6] = 1 + 2**-20  # 6 of 72: kept in FP32 alone
        weight[1, :3] = 1 + 2**-7  # 3: BF16 tells it from 1, HiF8 does not
        weight[2, 0] = 1.125  # 1: becomes 16
    assert probe.row(5) == {"step": 5, "updated": {"stored": 10 / 72, "bf16": 4 / 72, "format": 1 / 72}}
    assert UpdateStats(model).row(6)["updated"] == {"stored": 0, "bf16": 0, "format": 0}


def test_a_bf16_run_counts_the_updates_of_all_its_linears():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    probe = UpdateStats(model)
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    assert probe.row(1)["updated"] == {"stored": 1 / 24, "bf16": 1 / 24, "format": None}


# ---------------------------------------------------------------------------------------------------- nothing changes


SMALLER = ("model.blocks=3", "model.architecture.num_hidden_layers=3")
RELEASED = ("experiment=exp3", "protocol=released", *SMALLER)


@pytest.mark.parametrize("words", [("experiment=exp8",), RELEASED], ids=["paper", "released"])
def test_looking_changes_no_number(configure, tmp_path, words):
    results = []
    for every in (1, 1000):
        cfg = configure(tmp_path / str(every), *words, "budget.steps=3", **{"budget.telemetry_every": every})
        run = loop.train(cfg)
        files = {path.name: path.read_bytes() for path in run.checkpoints.rglob("*.safetensors")}
        keys = ("loss", "grad_norm", "overshoot_max", "overshoot_share")
        results.append((files, [[row[key] for key in keys] for row in run.metrics()]))
        looked = {row["step"] for row in run.telemetry() if "text" not in row}
        assert len(looked) == (3 - cfg.bf16_warmup_steps if every == 1 else 2)
    assert results[0] == results[1]


def test_a_row_of_a_baseline_says_what_its_updates_survive(config):
    cfg = baseline_of(config("experiment=exp8", "protocol=released", "budget.steps=2"))
    updated = [row["updated"] for row in loop.train(cfg).telemetry() if "updated" in row][-1]
    assert 0 < updated["stored"] == updated["bf16"] < 0.9 and updated["format"] is None
