"""One optimizer step in four acts: accumulate gradients, clip them, update weights, update scales.

Nothing in a step waits for the device: whether its gradient is finite is decided there, and if not, the step leaves
weights, moments and (with a tick a step) scales as they were. Who reads the result, waits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from qat.config import Config
from qat.models.load import attend_causally, checkpoint_activations, transformer_blocks
from qat.models.loss import TokenLosses
from qat.quant.convert import quantized_linears
from qat.quant.linear import forget_rounded_weights, round_weights
from qat.quant.scaling import ScaleBank
from qat.train.schedule import learning_rate
from qat.utils import device, distributed, environment


@dataclass
class StepResult:
    """The result of one step over all ranks.

    loss: mean in nats a token. grad_norm: before clipping. finite: whether both are, without which nothing was changed;
    these are 0-dim tensors on the device. lr: learning rate. tokens: trained on. overshoot: of every quantized tensor,
    FP32 [tensors] on the device; None in BF16.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    finite: torch.Tensor
    lr: float
    tokens: int
    overshoot: torch.Tensor | None


def eagerly():
    """Return a context in which nothing compiled runs, and nothing is compiled."""
    return torch.compiler.set_stance("force_eager")


class Trainer:
    """Trains a model step by step: holds model, optimizer, scale bank and configuration."""

    def __init__(self, model: nn.Module, bank: ScaleBank | None, cfg: Config):
        self.model, self.bank, self.cfg = model, bank, cfg
        attend_causally(model)
        if cfg.budget.activation_checkpointing:
            checkpoint_activations(model)
        self._linears = list(quantized_linears(model).values())
        losses = TokenLosses(model, cfg.data.label_shift, cfg.budget.largest_logits)
        if cfg.budget.compile:
            self._compile(losses)
        self.losses = distributed.distribute(losses, transformer_blocks(model), cfg.budget.parallel)
        self.arithmetic = device.resolve_arithmetic(cfg.budget.arithmetic)
        self.first_quantized_step = cfg.bf16_warmup_steps + 1
        o = cfg.optim
        # Weight decay on every parameter, norms too, as in the released code.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        self._store()

    def _compile(self, losses: TokenLosses) -> None:
        """Compile the whole forward pass, or block by block what FSDP gathers block by block."""
        parts, sharded = [losses], environment.world_size() > 1 and self.cfg.budget.parallel == "fsdp"
        if sharded:
            parts = transformer_blocks(self.model)
            torch._dynamo.config.recompile_limit = 4 * len(parts)  # each is another graph of the same code
        for part in parts:
            part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)

    def step(self, number: int, micro_batches: list[torch.Tensor], observed: bool = False) -> StepResult:
        """Run step `number` (1-based) on this rank's int64 micro-batches [sequences, length + 1], as many on every
        rank. observed: tensor statistics look on, so nothing may be compiled."""
        if self.bank is not None:
            self.bank.begin_step(number, self.first_quantized_step)
        loss, tokens, overshoot = self._accumulate(micro_batches, observed)
        grad_norm = distributed.full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip))
        finite = grad_norm.isfinite() & loss.isfinite()
        lr = self._update_weights(number, finite)
        if self.bank is not None and self.cfg.scaling.tick == "step":
            overshoot = self.bank.tick(finite)
        return StepResult(loss, grad_norm, finite, lr, tokens, overshoot)

    def _accumulate(self, micro_batches: list[torch.Tensor], observed: bool):
        """Add up the gradients of the mean loss over all tokens of the step, however these are spread over
        micro-batches and ranks. Returns (loss, tokens, with a tick a call the largest overshoot)."""
        self.optimizer.zero_grad(set_to_none=True)
        lost = 1 if self.cfg.data.label_shift == "twice" else 0
        tokens = environment.world_size() * sum(batch.shape[0] * (batch.shape[1] - 1 - lost) for batch in micro_batches)
        tick_a_call = self.bank is not None and self.cfg.scaling.tick == "call"
        total, overshoot = 0.0, None
        for index, batch in enumerate(micro_batches, start=1):
            if index == 1 or tick_a_call:
                self.round_weights()
            with distributed.gradient_sync(self.losses, last=index == len(micro_batches)), self._stance(observed):
                loss = self._forward(device.to_device(batch)).sum() / tokens
                loss.backward()
            total = total + loss.detach()
            if tick_a_call:
                now = self.bank.tick()
                overshoot = now if overshoot is None else torch.maximum(overshoot, now)
        return distributed.all_reduce_sum(total), tokens, overshoot

    def _stance(self, observed: bool):
        """Say whether what is compiled runs so. Tensors without a history, as in the first quantized step, take other
        operations: one step is not worth a compilation."""
        unseen = self.bank is not None and self.bank.quantizing and self.bank.unseen
        return eagerly() if observed or unseen else contextlib.nullcontext()

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with device.autocast(self.arithmetic):
            return self.losses(tokens)

    def round_weights(self) -> None:
        """Round the weights once for all forward passes until they change. Sharded ones are whole within a pass only,
        and are rounded there."""
        if self.bank is not None and self.bank.quantizing and not distributed.is_sharded(self.losses):
            round_weights(self._linears, torch.bfloat16 if self.arithmetic == "bf16" else torch.float32)

    def _update_weights(self, number: int, finite: torch.Tensor) -> float:
        """Update the weights where the step is finite; returns the learning rate."""
        lr = learning_rate(self.cfg, number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # What GradScaler tells a fused optimizer: skip this step on the device.
        self.optimizer.found_inf = (~finite).to(torch.float32)
        self.optimizer.step()
        self._store()
        forget_rounded_weights(self._linears)
        return lr

    @torch.no_grad()
    def _store(self) -> None:
        """Without master weights, parameters and Adam moments keep only what BF16 can hold, as in the released code."""
        if self.cfg.optim.master_weights:
            return
        moments = (state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
        for tensor in (*self.model.parameters(), *moments):
            tensor.copy_(tensor.bfloat16())
