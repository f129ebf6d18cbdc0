"""One optimizer step in four acts: accumulate gradients, clip and check them, update, commit the scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qat import runtime
from qat.config import Config, UserError
from qat.scaling import ScaleBank


@dataclass
class StepResult:
    """Of one step, as device tensors or plain numbers: mean loss in nats a token; gradient norm before clipping;
    learning rate; tokens trained on; overshoot of every quantized tensor ([tensors] FP32, None in BF16)."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    tokens: int
    overshoot: torch.Tensor | None


def learning_rate(cfg: Config, step: int) -> float:
    """Learning rate of a step (1-based): linear warmup, then cosine towards 0, as in the released code."""
    warmup = cfg.lr_warmup_steps
    if step <= warmup:
        return cfg.optim.lr * step / warmup
    progress = (step - 1 - warmup) / (cfg.steps - warmup)
    return cfg.optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def token_losses(model: nn.Module, tokens: torch.Tensor, label_shift: str = "once") -> torch.Tensor:
    """Cross-entropy in nats of every predicted token, FP32 [sequences, length].

    tokens: int64 [sequences, length + 1]. "once": position i predicts token i+1. "twice" repeats the released code's
    mistake (experiments/README.md): position i is trained to predict token i+2, so one column is lost.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits
    if label_shift == "twice":
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


class Trainer:
    """What a step needs beside the batch: model, optimizer, scale bank, and the configuration."""

    def __init__(self, model: nn.Module, bank: ScaleBank | None, cfg: Config):
        self.model, self.bank, self.cfg = model, bank, cfg
        self.arithmetic = runtime.arithmetic(cfg.budget.arithmetic)
        self.first_quantized_step = cfg.bf16_warmup_steps + 1
        o = cfg.optim
        # Weight decay on every parameter, norms too, as in the released code.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        self._store()

    def step(self, number: int, micro_batches: list[torch.Tensor]) -> StepResult:
        """Run step `number` (1-based) on int64 micro-batches [sequences, length + 1]."""
        if self.bank is not None:
            self.bank.begin_step(number, self.first_quantized_step)
        loss, tokens, overshoot = self._accumulate(number, micro_batches)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip)
        if not torch.isfinite(grad_norm):
            raise UserError(
                f"step {number}: the gradient is not finite (loss {loss.item():.4g}), weights were not changed; "
                f"lower optim.lr={self.cfg.optim.lr:g} or change quant.overflow={self.cfg.quant.overflow}"
            )
        lr = self._update(number)
        if self.bank is not None and self.cfg.scaling.tick == "step":
            overshoot = self._commit(number, overshoot)
        return StepResult(loss, grad_norm, lr, tokens, overshoot)

    def _accumulate(self, number: int, micro_batches: list[torch.Tensor]):
        """Gradients of the mean loss over all tokens of the step, however they are spread over micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        shift = self.cfg.data.label_shift
        lost = 1 if shift == "twice" else 0
        tokens = sum(batch.shape[0] * (batch.shape[1] - 1 - lost) for batch in micro_batches)
        total, overshoot = 0.0, None
        for batch in micro_batches:
            with runtime.autocast(self.arithmetic):
                losses = token_losses(self.model, batch.to(runtime.device()), shift)
            loss = losses.sum() / tokens
            loss.backward()
            total = total + loss.detach()
            if self.bank is not None and self.cfg.scaling.tick == "call":
                overshoot = self._commit(number, overshoot)
        return total, tokens, overshoot

    def _commit(self, number: int, overshoot: torch.Tensor | None) -> torch.Tensor:
        """One tick of the bank; returns the largest overshoot of each tensor so far in this step."""
        now = self.bank.overshoot()
        self.bank.commit(number)
        return now if overshoot is None else torch.maximum(overshoot, now)

    def _update(self, number: int) -> float:
        lr = learning_rate(self.cfg, number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._store()
        return lr

    @torch.no_grad()
    def _store(self) -> None:
        """Without master weights, parameters and Adam moments keep only what BF16 can hold, as in the released code."""
        if self.cfg.optim.master_weights:
            return
        moments = (state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
        for tensor in (*self.model.parameters(), *moments):
            tensor.copy_(tensor.bfloat16())
