"""One optimizer step: against a plain PyTorch loop, over micro-batches, in BF16 storage, and when it goes wrong."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from qat.data import packing
from qat.models import tokenizer
from qat.models.load import load_model
from qat.quant import hif8
from qat.quant.convert import convert
from qat.train import schedule
from qat.train.loop import train
from qat.train.step import Trainer
from qat.train.tensor_stats import TensorStats
from qat.utils import device

BOTH = pytest.mark.usefixtures("arithmetic")


def build(cfg) -> Trainer:
    model, _ = load_model(cfg.model, cfg.seed)
    return Trainer(model, convert(model, cfg)[0], cfg)


def tokens(sequences: int, length: int = 33, seed: int = 0) -> torch.Tensor:
    return torch.randint(257, (sequences, length), generator=torch.Generator().manual_seed(seed))


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


# ------------------------------------------------------------------------------------------------ against plain PyTorch


def plain_losses(cfg) -> list[float]:
    """Losses of the run that `cfg` describes, trained without any of its code but the token stream."""
    torch.manual_seed(cfg.seed)
    model = LlamaForCausalLM(LlamaConfig(**cfg.model.architecture))
    stream = packing.training_stream(cfg.data, cfg.seed, tokenizer.byte_tokenizer())
    options = {"lr": cfg.optim.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    bf16 = device.resolve_arithmetic("auto") == "bf16"
    losses = []
    for step in range(1, 13):
        batch = stream.micro_batch(2, 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(batch[:, :-1]).logits
        loss = (
            F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(2, 32).sum()
            / 64
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (step / 2 if step < 3 else 0.5 + 0.5 * math.cos(math.pi * (step - 3) / 10))
        optimizer.step()
        losses.append(loss.item())
    return losses


@BOTH
def test_a_bf16_run_is_plain_training_bit_for_bit(config):
    cfg = config(**{"quant.format": "none", "optim.lr": 2e-3, "optim.lr_warmup": 0.17, "budget.accumulation": 1})
    assert cfg.steps == 12 and cfg.lr_warmup_steps == 2
    run = train(cfg)
    losses = [row["loss"] for row in run.metrics()]
    assert losses == plain_losses(cfg)
    assert losses[-1] < losses[0] - 0.5


# -------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("shift", ["once", "twice"])
def test_accumulated_gradients_are_those_of_one_large_batch(config, arithmetic, shift):
    cfg = config(**{"quant.format": "none", "data.label_shift": shift})
    batch = tokens(4)
    results, grads = [], []
    for parts in (4, 2, 1, [1, 3]):  # sequences of a micro-batch; one of three weighs three times as much
        trainer = build(cfg)
        results.append(trainer.step(1, list(batch.split(parts))))
        grads.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    for result, grad in zip(results[1:], grads[1:], strict=True):
        torch.testing.assert_close(result.loss, results[0].loss)
        # Products of BF16 are rounded to 8 bits a micro-batch, sums of FP32 to 24 in another order.
        assert (grad - grads[0]).norm() <= (2**-8 if arithmetic == "bf16" else 1e-6) * grads[0].norm()
    assert {result.tokens for result in results} == {4 * (32 if shift == "once" else 31)}
    other = build(cfg).step(1, [batch[:2]])
    assert abs(other.loss - results[0].loss) > 1e-4  # one micro-batch alone has another mean


@BOTH
def test_activation_checkpointing_changes_no_bit_of_weights_scales_or_telemetry(config):
    seen = []
    for checkpointing in (False, True):
        options = {"warmup.bf16": 0.0, "optim.lr": 1e-3, "budget.activation_checkpointing": checkpointing}
        trainer, entered = build(config("experiment=exp8", **options)), []
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, entered=entered: entered.append(1))
        for number in (1, 2, 3):
            probe = TensorStats(trainer.model)
            with probe.attached():
                result = trainer.step(number, [tokens(2), tokens(2, seed=number)], observed=True)
        state = result.loss, trainer.bank.state_dict(), trainer.model.state_dict()
        seen.append((state, probe.rows(3), len(entered)))
    (plain, rows, once), (checkpointed, again, twice) = seen
    assert again == [pytest.approx(row) for row in rows] and twice == 2 * once
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- learning rate, storage


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(config):
    cfg = config(**{"budget.steps": 200, "optim.lr_warmup": 0.1, "optim.lr": 2.0})
    rates = [schedule.learning_rate(cfg, step) for step in range(1, 201)]
    assert rates[:20] == pytest.approx([0.1 * step for step in range(1, 21)])
    assert rates[20] == 2.0 and all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert rates[20 + 90] == pytest.approx(1.0)  # halfway down
    assert 0 < rates[-1] < 2.0 * 1e-3
    cfg.optim.lr_warmup = 0.0
    assert schedule.learning_rate(cfg, 1) == 2.0 and schedule.learning_rate(cfg, 101) == pytest.approx(1.0)


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_the_released_code_warms_up_one_step_behind_the_paper(config, protocol):
    """Its schedule is transformers' cosine with warmup, whose first step has a rate of 0."""
    cfg = config("experiment=exp3", f"protocol={protocol}", **{"budget.steps": 200, "optim.lr_warmup": 0.1})
    parameter = torch.nn.Parameter(torch.zeros(()))
    theirs = get_cosine_schedule_with_warmup(torch.optim.SGD([parameter], lr=cfg.optim.lr), 20, 200)
    released = [theirs.lr_lambdas[0](step) * cfg.optim.lr for step in range(200)]
    rates = [schedule.learning_rate(cfg, step) for step in range(1, 201)]
    assert rates[20:] == pytest.approx(released[20:])
    assert rates[:20] == pytest.approx(released[:20] if protocol == "released" else released[1:21])


# ----------------------------------------------------------------------------------------------------------------- CAGE


def test_cage_is_silent_and_then_rises_linearly(config):
    cfg = config("estimator=cage", **{"budget.steps": 50})
    rise = [schedule.cage(cfg, step) for step in range(1, 51)]
    assert rise[:40] == [0] * 40 and rise[40:] == pytest.approx(list(range(1, 11)))


def test_cage_corrects_what_adamw_made_of_the_weights(config):
    """Its step is STE's, and then w -= lr * lambda * (w - round(w * s) / s) of every quantized weight alone."""
    words = {"optim.lr": 1e-2, "warmup.bf16": 0.0}
    plain, ours = build(config(**words)), build(config("estimator=cage", **words, **{"quant.cage_silent": 0.5}))
    for number in range(1, 7):
        for trainer in (plain, ours):
            trainer.step(number, [tokens(2, seed=number)])
        assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    scales = {name: scale.clone() for name, scale in zip(ours.bank.names, ours.bank.scales, strict=True)}
    rate = [trainer.step(7, [tokens(2, seed=7)]) for trainer in (plain, ours)][1].lr * 10 / 6
    corrected = 0
    for name, weight in parameters(plain).items():
        scale = scales.get(name.replace(".weight", "/weight"))
        if scale is not None:
            error = weight - hif8.fake_quantize((weight * scale).clamp(-15, 15)) / scale
            weight, corrected = weight - rate * error, corrected + (error != 0).sum()
        torch.testing.assert_close(parameters(ours)[name], weight, rtol=1e-6, atol=1e-9)
    assert corrected


def holds_bf16(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize("masters", [True, False])
def test_without_master_weights_all_that_is_kept_is_bf16(config, masters):
    trainer = build(config("experiment=exp3", **{"optim.master_weights": masters, "optim.lr": 1e-3}))
    assert masters or all(holds_bf16(p) for p in trainer.model.parameters())
    for number in (1, 2):
        trainer.step(number, [tokens(2, seed=number)])
        moments = [s[name] for s in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        kept = [*trainer.model.parameters(), *moments]
        assert len(moments) == 2 * len(list(trainer.model.parameters()))
        assert all(map(holds_bf16, kept)) != masters


def test_a_pure_bf16_model_is_bf16_throughout(config):
    """Residual stream and sums of gradients over micro-batches, too, as in the released code."""
    words = {"optim.master_weights": False, "optim.pure_bf16": True, "budget.arithmetic": "bf16", "optim.clip": 1e9}
    batches, gradients, residuals = [tokens(2, seed=seed) for seed in (1, 2)], [], []
    for micro_batches in ([batches[0]], [batches[1]], batches):
        trainer = build(config("experiment=exp5", **words))
        trainer.model.model.norm.register_forward_pre_hook(lambda _, inputs: residuals.append(inputs[0].dtype))
        trainer.step(1, micro_batches)
        gradients.append([p.grad for p in trainer.model.parameters()])
    assert all(torch.equal(both, one / 2 + other / 2) for one, other, both in zip(*gradients, strict=True))
    moments = [s[name] for s in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*trainer.model.parameters(), *gradients[2], *moments]
    assert {t.dtype for t in tensors} == set(residuals) == {torch.bfloat16}
    assert trainer.model.model.rotary_emb.inv_freq.dtype is torch.float32


def test_without_master_weights_a_small_update_vanishes(config):
    """Paper.md, section 4, row 9: BF16 keeps 8 bits, so an update of lr 1e-5 is lost on weights above 2^-8."""
    changed = {}
    for masters in (True, False):
        words = {"quant.format": "none", "optim.lr": 1e-5, "optim.lr_warmup": 0.0, "optim.master_weights": masters}
        trainer = build(config(**words))
        before = parameters(trainer)
        trainer.step(1, [tokens(2)])
        large = [(before[n].abs() > 2**-7, before[n] != p) for n, p in parameters(trainer).items() if "mlp" in n]
        changed[masters] = sum((big & moved).sum() for big, moved in large) / sum(big.sum() for big, _ in large)
    assert changed[True] > 0.99 and changed[False] == 0


# --------------------------------------------------------------------------------------------------------- distillation


def test_a_distilled_baseline_starts_without_a_gradient(config):
    """Its first step only decays weights, of which its teacher sees nothing. The cross-entropy is reported as ever."""
    words = {"optim.lr": 1e-2, "optim.lr_warmup": 0.0}
    plain, ours = (build(config("quant=bf16", f"loss={loss}", **words)) for loss in ("ce", "distill"))
    before = parameters(ours)
    results = [trainer.step(1, [tokens(2), tokens(2, seed=1)]) for trainer in (plain, ours)]
    assert results[0].loss == results[1].loss and results[0].objective == results[0].loss
    assert results[1].objective == results[1].grad_norm == 0 and results[1].finite
    for name, weight in parameters(ours).items():
        torch.testing.assert_close(weight, (1 - 1e-2 * 0.1) * before[name])
    teacher = ours.losses.teacher
    assert all(torch.equal(before[name], weight) for name, weight in teacher.named_parameters())
    assert not teacher.training and ours.losses.model.training and not ours.losses.eval().model.training
    assert ours.step(2, [tokens(2)]).objective > 0


def test_a_quantized_model_is_distilled_from_the_unquantized_one(config, arithmetic):
    """Against `F.kl_div` of plain models, in the first quantized step."""
    words = ("experiment=exp8", "warmup.bf16=0", "+model.architecture.initializer_range=0.2")
    trainer, pretrained, other = (build(config(*words, word)) for word in ("loss=distill", "quant=bf16", "loss=ce"))
    result, batch = trainer.step(1, [tokens(4)]), tokens(4)
    other.bank.begin_step(1, 1)
    logs = []
    for each in (other, pretrained):
        with device.autocast(each.arithmetic):
            logs.append(each.model(input_ids=batch[:, :-1]).logits.float().log_softmax(-1))
    wanted = F.kl_div(*logs, reduction="none", log_target=True).sum(-1).mean()
    wanted.backward()
    assert result.objective == pytest.approx(wanted.item(), rel=1e-3) and result.objective > 1e-3
    norm = torch.cat([p.grad.flatten() for p in other.model.parameters()]).norm().item()
    assert result.grad_norm == pytest.approx(norm, rel=2**-7 if arithmetic == "bf16" else 1e-4)


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("algo", ["max", "current"])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_no_scale(config, algo):
    trainer = build(config(**{"scaling.algo": algo, "quant.cage": 10.0, "quant.cage_silent": 0.0}))
    trainer.step(1, [tokens(2)])
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.inf
    weights, moments = parameters(trainer), copy.deepcopy(trainer.optimizer.state_dict()["state"])
    scales = copy.deepcopy(trainer.bank.state_dict())
    result = trainer.step(2, [tokens(2)])
    assert not result.finite and not result.grad_norm.isfinite() and result.loss.isnan()
    assert all(torch.equal(weights[name], now) for name, now in parameters(trainer).items())
    state = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i][name], state[i][name]) for i in moments for name in moments[i])
    now = trainer.bank.state_dict()
    assert torch.equal(scales["scale"], now["scale"])
    filled, position, _ = scales["counters"]
    assert torch.equal(now["counters"][:2], torch.stack([filled, position]))
    assert torch.equal(scales["history"][:filled], now["history"][:filled])


def test_the_gradient_norm_is_reported_before_clipping(config):
    cfg = config(**{"quant.format": "none", "optim.clip": 1e-3})
    trainer = build(cfg)
    norm = trainer.step(1, [tokens(2)]).grad_norm
    clipped = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert norm > 0.5 and clipped == pytest.approx(1e-3, rel=1e-3)
