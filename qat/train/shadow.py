"""Try scaling rules side by side: the same weights and the same batch, rounded with the scales of each rule.

At steps with telemetry, before the step, forward and backward passes are run under the scales of every rule of
`scaling.shadow`, and once without quantization. The state of training stays as it is, to the bit: weights, scales,
recorded amaxes, random numbers, and DDP's buckets.
"""

from __future__ import annotations

import math

import torch

from qat.config import ROLES, Config
from qat.quant.rules import named
from qat.quant.scaling import ScaleBank
from qat.runs.folder import Run
from qat.train.step import StepResult, Trainer
from qat.train.tensor_stats import TensorStats
from qat.utils import device, distributed, environment


class Shadow:
    """The banks of the rules of `scaling.shadow`, which see the same amaxes as the run's own; in BF16 there are none.

    After a resume they are made again from the trace of the steps done, so that checkpoints need not have them.
    """

    def __init__(self, trainer: Trainer, cfg: Config, run: Run, done: int):
        self.trainer, self.cfg, self.banks, own = trainer, cfg, {}, trainer.bank
        if own is None or not cfg.scaling.shadow:
            return
        trace = run.amaxes()[1][:done] if done and environment.is_main_process() else None
        trace = distributed.broadcast_object(trace)
        for name in cfg.scaling.shadow:
            rule = named(name, cfg.scaling, "scaling.shadow")
            bank = self.banks[name] = ScaleBank(own.names, own.targets.tolist(), rule, device=own.scale.device)
            if done:
                bank.replay(torch.tensor(trace, device=own.scale.device), trainer.first_quantized_step)

    def tick(self, step: int, result: StepResult) -> None:
        """Advance the banks as a step advanced the run's own."""
        for bank in self.banks.values():
            bank.begin_step(step, self.trainer.first_quantized_step)
            if bank.recording:
                bank.advance(result.amax, result.finite)

    def rows(self, step: int, micro_batches: list[torch.Tensor]) -> list[dict]:
        """Return a row for each rule; none before there is a history, when all rules scale by a tensor's own amax.

        Columns: step, shadow (the rule), loss and that unquantized, in nats; cosine and norm_error (ratio of norms less
        1) of the gradient of all parameters against the unquantized one; by role, the means over tensors of sqnr_db and
        clipped (the share of elements beyond the target).
        """
        if all(len(bank.unseen) == len(bank) for bank in self.banks.values()):  # also if there are none
            return []
        random = device.rng_state()
        unquantized, reference = self._pass(None, micro_batches, random)
        rows = []
        for name, bank in self.banks.items():
            stats = TensorStats(self.trainer.model)
            with stats.attached():
                loss, gradients = self._pass(bank, micro_batches, random)
            row = {"step": step, "shadow": name, "loss": _finite(loss), "unquantized": _finite(unquantized)}
            rows.append(row | _compared(gradients, reference) | _by_role(stats.rows(step)))
        device.set_rng_state(random)
        return rows

    def _pass(self, bank: ScaleBank | None, micro_batches: list[torch.Tensor], random: dict[str, torch.Tensor]):
        device.set_rng_state(random)
        with self.trainer.bank.borrowing(bank):
            return self.trainer.gradients(micro_batches)


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _compared(gradients: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float | None]:
    sums = torch.zeros(3, dtype=torch.float64, device=reference[0].device)
    for ours, theirs in zip(gradients, reference, strict=True):
        ours, theirs = ours.double().flatten(), theirs.double().flatten()
        sums += torch.stack([ours @ theirs, ours @ ours, theirs @ theirs])
    both, ours, theirs = sums.tolist()
    if not (math.isfinite(both) and ours > 0 and theirs > 0):
        return {"cosine": None, "norm_error": None}
    return {"cosine": both / math.sqrt(ours * theirs), "norm_error": math.sqrt(ours / theirs) - 1}


def _by_role(rows: list[dict]) -> dict[str, dict[str, float]]:
    means = {}
    for column, key in (("sqnr_db", "sqnr_db"), ("clipped", "beyond")):
        values = {role: [row[key] for row in rows if row["role"] == role and row[key] is not None] for role in ROLES}
        means[column] = {role: sum(own) / len(own) for role, own in values.items() if own}
    return means
