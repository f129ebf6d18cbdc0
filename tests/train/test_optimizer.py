"""Adam's moments in fewer bytes: what they take, what an update makes of them, and steps that are skipped."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch

from qat.quant import hif8
from qat.train import optimizer
from tests.train.test_step import build, parameters, tokens

WORDS = {"optim.lr": 3e-3, "optim.lr_warmup": 0.0, "warmup.bf16": 0.0}


def losses(trainer, steps: int) -> list[float]:
    return [trainer.step(number, [tokens(2, seed=number % 3)]).loss.item() for number in range(1, steps + 1)]


@pytest.mark.parametrize(("moments", "taken"), [("bf16", 4), ("hif8", 3)])
def test_moments_take_the_bytes_that_are_planned(config, moments, taken):
    cfg = config("quant=bf16", **WORDS, **{"optim.moments": moments})
    trainer = build(cfg)
    losses(trainer, 1)
    sizes = Counter()
    for state in trainer.optimizer.state.values():
        for key, tensor in state.items():
            sizes[key] += tensor.nbytes
    assert cfg.optim.moment_bytes == taken
    assert sizes["exp_avg"] + sizes["exp_avg_sq"] == taken * sum(p.numel() for p in trainer.model.parameters())
    assert sizes["step"] + sizes["scales"] <= 12 * len(trainer.optimizer.state)


@pytest.mark.parametrize("moments", ["bf16", "hif8"])
def test_an_update_is_adamws_of_the_moments_that_were_held(config, moments):
    plain, ours = (build(config("quant=bf16", **WORDS, **{"optim.moments": how})) for how in ("fp32", moments))
    assert type(plain.optimizer) is torch.optim.AdamW
    for trainer in (plain, ours):
        losses(trainer, 1)
    assert all(map(torch.equal, plain.model.parameters(), ours.model.parameters()))  # the first moments are zero
    for theirs, weight in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        wanted, state = plain.optimizer.state[theirs], ours.optimizer.state[weight]
        held = dict(zip(("exp_avg", "exp_avg_sq"), ours.optimizer.unpacked(state), strict=True))
        if moments == "bf16":
            rounded = {key: wanted[key].bfloat16().float() for key in held}
        else:
            (first, second), half = state["scales"], wanted["exp_avg_sq"] * state["scales"][1]
            rounded = {"exp_avg": hif8.fake_quantize(wanted["exp_avg"] * first) / first}
            rounded["exp_avg_sq"] = half.half().float() / second
            assert first * wanted["exp_avg"].abs().max() == pytest.approx(15)
            assert half.max() == pytest.approx(2**15)
        for key, tensor in held.items():
            torch.testing.assert_close(tensor, rounded[key], rtol=0, atol=0)
            wanted[key].copy_(tensor)
    for trainer in (plain, ours):
        trainer.step(2, [tokens(2, seed=5)])
    assert all(map(torch.equal, plain.model.parameters(), ours.model.parameters()))


@pytest.mark.parametrize("moments", ["bf16", "hif8"])
def test_a_skipped_step_leaves_small_moments_alone(config, moments):
    trainer = build(config("quant=bf16", **WORDS, **{"optim.moments": moments}))
    losses(trainer, 2)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.inf
    before, weights = copy.deepcopy(trainer.optimizer.state_dict()["state"]), parameters(trainer)
    assert not trainer.step(3, [tokens(2)]).finite
    assert all(torch.equal(weights[name], now) for name, now in parameters(trainer).items())
    after = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


def test_bf16_moments_are_those_of_bf16_storage(config):
    """Without master weights, FP32 moments hold what BF16 can: in half the bytes they are the same."""
    words = WORDS | {"optim.master_weights": False}
    wide, narrow = (build(config(**words, **{"optim.moments": moments})) for moments in ("fp32", "bf16"))
    assert losses(wide, 4) == losses(narrow, 4)
    assert all(map(torch.equal, wide.model.parameters(), narrow.model.parameters()))


def test_the_second_moment_forgets():
    """Forget gradients once they are small: HiF8 instead of FP16 would hold some values for ever."""
    weight = torch.nn.Parameter(torch.ones(64))
    ours = optimizer.HiF8AdamW([weight], lr=1e-3, betas=(0.9, 0.95), fused=True)
    ours.found_inf = torch.zeros(())
    for step in range(61):
        weight.grad = torch.linspace(0.5, 1, 64) if step == 0 else torch.zeros(64)
        ours.step()
    _, second = ours.unpacked(ours.state[weight])
    torch.testing.assert_close(second, 0.05 * 0.95**60 * torch.linspace(0.5, 1, 64) ** 2, rtol=0.02, atol=0)


def test_training_with_small_moments_goes_like_training_with_fp32(config):
    wide, narrow = (losses(build(config(**WORDS, **{"optim.moments": how})), 12) for how in ("fp32", "hif8"))
    fall = wide[0] - wide[-1]
    assert fall > 0.3 and narrow == pytest.approx(wide, abs=0.05 * fall) and narrow != wide


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_hif8_moment_forgets_beside_large_neighbours(noise):
    """Without a gradient the second moment shrinks: were the first one held, the weight would run away."""
    draw, lr, beta = torch.Generator().manual_seed(0), 1e-3, (0.9, 0.95)
    weight = torch.nn.Parameter(torch.zeros(1024))
    ours = optimizer.HiF8AdamW([weight], lr=lr, betas=beta, eps=1e-8, weight_decay=0.0, fused=True)
    ours.found_inf = torch.zeros(())
    small = torch.logspace(-7, -3, 960)
    for step in range(600):
        busy = 0.01 * (1 + noise * torch.randn(64, generator=draw))
        weight.grad = torch.cat([small * (step == 0), busy])
        ours.step()
    assert weight[:960].abs().max() < 20 * lr  # FP32: 7 lr
