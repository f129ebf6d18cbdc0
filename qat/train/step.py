"""One optimizer step in four acts: accumulate gradients, clip them, update weights, update scales.

Nothing in a step waits for the device; only reading the result does. Whether the gradient is finite is decided on the
device. If it is not, weights, Adam moments and (with a tick a step) scales stay as they were.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from qat.config import Config
from qat.models.load import attend_causally, checkpoint_activations, load_model, store_in_bf16, transformer_blocks
from qat.models.loss import TokenLosses
from qat.quant.convert import quantized_linears
from qat.quant.linear import draw_to_grid, forget_rounded_weights, round_weights
from qat.quant.scaling import ScaleBank
from qat.train import optimizer, schedule
from qat.utils import device, distributed, environment


@dataclass
class StepResult:
    """The result of one step over all ranks.

    loss: mean cross-entropy in nats a token. objective: what is minimized, the loss itself where nothing is distilled.
        grad_norm: before clipping. finite: whether loss and norm are; if not, nothing was changed. These four are 0-dim
        tensors on the device.
    lr: learning rate. tokens: how many were trained on.
    amax, overshoot: of every quantized tensor, FP32 [tensors] on the device; None in BF16.
    """

    loss: torch.Tensor
    objective: torch.Tensor
    grad_norm: torch.Tensor
    finite: torch.Tensor
    lr: float
    tokens: int
    amax: torch.Tensor | None
    overshoot: torch.Tensor | None


def eagerly():
    """Return a context in which compiled functions run eagerly and nothing is compiled."""
    return torch.compiler.set_stance("force_eager")


class Trainer:
    """Train a model step by step: model, optimizer, scale bank and configuration."""

    def __init__(self, model: nn.Module, bank: ScaleBank | None, cfg: Config):
        self.model, self.bank, self.cfg = model, bank, cfg
        # What is distilled is what training starts from.
        teacher = load_model(cfg.model, cfg.seed)[0] if cfg.loss.distill else None
        models = [model] if teacher is None else [model, teacher]
        for network in models:
            attend_causally(network)
            if cfg.optim.pure_bf16:
                store_in_bf16(network)
        if cfg.budget.activation_checkpointing:
            checkpoint_activations(model)
        self._linears = list(quantized_linears(model).values())
        losses = TokenLosses(model, cfg.data.label_shift, cfg.budget.largest_logits, teacher, cfg.loss.distill)
        blocks = [block for network in models for block in transformer_blocks(network)]
        if cfg.budget.compile:
            self._compile(losses, blocks)
        self.losses = distributed.distribute(losses, blocks, cfg.budget.parallel)
        self.arithmetic = "bf16" if cfg.optim.pure_bf16 else device.resolve_arithmetic(cfg.budget.arithmetic)
        self.first_quantized_step = cfg.bf16_warmup_steps + 1
        self.optimizer = optimizer.make(model.parameters(), cfg.optim)
        self._store()

    def _compile(self, losses: TokenLosses, blocks: list[nn.Module]) -> None:
        """Compile the whole forward pass, or with FSDP, which gathers parameters block by block, every block."""
        parts = [losses]
        if environment.world_size() > 1 and self.cfg.budget.parallel == "fsdp":
            parts = blocks
            torch._dynamo.config.recompile_limit = 4 * len(parts)  # every block is another graph of the same code
        for part in parts:
            part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)

    def step(self, number: int, micro_batches: list[torch.Tensor], observed: bool = False) -> StepResult:
        """Run step `number` (1-based).

        micro_batches: this rank's, int64 [sequences, length + 1]; every rank has as many. observed: run eagerly,
        because tensor statistics are collected.
        """
        if self.bank is not None:
            self.bank.begin_step(number, self.first_quantized_step)
        objective, loss, tokens, ticked = self._accumulate(micro_batches, observed)
        grad_norm = distributed.full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip))
        finite = grad_norm.isfinite() & loss.isfinite()
        lr = self._update_weights(number, finite)
        if self.bank is not None and self.cfg.scaling.tick == "step":
            ticked = self.bank.tick(finite)
        amax, overshoot = (None, None) if ticked is None else ticked
        return StepResult(loss, objective, grad_norm, finite, lr, tokens, amax, overshoot)

    def gradients(self, micro_batches: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the loss and the gradients of a step that is not made, over all ranks; parameters keep none."""
        _, loss, _, _ = self._accumulate(micro_batches, observed=True, synchronized=False)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return loss, [distributed.all_reduce_sum(gradient) for gradient in gradients]

    def _accumulate(self, micro_batches: list[torch.Tensor], observed: bool, synchronized: bool = True):
        """Accumulate the gradients of the mean objective over all tokens of the step, of all micro-batches and ranks.

        synchronized: whether gradients are summed over the ranks, by DDP or FSDP.

        Returns (objective, cross-entropy, tokens, with a tick a call the largest of what `ScaleBank.tick` returns).
        """
        self.optimizer.zero_grad(set_to_none=True)
        shift = 2 if self.cfg.data.label_shift == "twice" else 1
        tokens = environment.world_size() * sum(batch.shape[0] * (batch.shape[1] - shift) for batch in micro_batches)
        tick_a_call = self.bank is not None and self.cfg.scaling.tick == "call"
        total, ticked = 0.0, None
        for index, batch in enumerate(micro_batches, start=1):
            if index == 1 or tick_a_call:
                self.round_weights()
            last = synchronized and index == len(micro_batches)
            with distributed.gradient_sync(self.losses, last), self._stance(observed):
                losses = self._forward(device.to_device(batch))
                means = [part.sum() / tokens for part in (losses if isinstance(losses, tuple) else (losses,))]
                means[0].backward()
            total = total + torch.stack(means).detach()
            if tick_a_call:
                now = self.bank.tick()
                ticked = now if ticked is None else torch.maximum(ticked, now)
        total = distributed.all_reduce_sum(total)
        return total[0], total[-1], tokens, ticked

    def _stance(self, observed: bool):
        """Return the context of a forward and backward pass: eager where compiled code cannot be used.

        Tensors without a history, as in the first quantized step, need other operations: compiling them for one step is
        not worth it.
        """
        unseen = self.bank is not None and self.bank.quantizing and self.bank.unseen
        return eagerly() if observed or unseen else contextlib.nullcontext()

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        with device.autocast(self.arithmetic):
            return self.losses(tokens)

    def round_weights(self) -> None:
        """Round the weights once for all forward passes until they change.

        Sharded weights are whole only within a pass, and are rounded there.
        """
        if self.bank is not None and self.bank.quantizing and not distributed.is_sharded(self.losses):
            round_weights(self._linears, torch.bfloat16 if self.arithmetic == "bf16" else torch.float32)

    def _update_weights(self, number: int, finite: torch.Tensor) -> float:
        """Update the weights if the step is finite; returns the learning rate."""
        lr = schedule.learning_rate(self.cfg, number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A fused optimizer reads this on the device and skips the step; GradScaler uses it in the same way.
        self.optimizer.found_inf = (~finite).to(torch.float32)
        self.optimizer.step()
        if self.bank is not None and self.bank.quantizing and (cage := schedule.cage(self.cfg, number)):
            draw_to_grid(self._linears, lr * cage, finite)
        self._store()
        forget_rounded_weights(self._linears)
        return lr

    @torch.no_grad()
    def _store(self) -> None:
        """Without master weights, round parameters and FP32 moments to BF16, as in the released code."""
        if self.cfg.optim.master_weights or self.cfg.optim.pure_bf16:  # with the latter they are of that type
            return
        states = self.optimizer.state.values() if self.cfg.optim.moments == "fp32" else ()
        moments = (state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
        for tensor in (*self.model.parameters(), *moments):
            tensor.copy_(tensor.bfloat16())
