"""Collect the state of a run for a checkpoint, and restore it: weights, scales, Adam moments, random numbers."""

from __future__ import annotations

import torch

from qat.config import Config
from qat.runs.folder import Run
from qat.train import checkpoint
from qat.train.step import Trainer
from qat.utils import device, distributed, environment


class TrainState:
    """The state of a run on this rank.

    done: how many steps are done. final: whether the last checkpoint of the run is written.
    """

    def __init__(self, cfg: Config, run: Run, trainer: Trainer):
        self.cfg, self.run, self.trainer, self.bank = cfg, run, trainer, trainer.bank
        self.names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        self.done, self.final = 0, False

    def restore(self) -> dict | None:
        """Load the newest undamaged checkpoint, if there is one. Returns its cursor of the data."""
        tensors, facts = checkpoint.latest(self.run.checkpoints, self.run.id) or (None, {})
        if tensors is not None:
            with checkpoint.restoring(self.run.checkpoints):
                self._load(tensors, facts)
        distributed.check_agreement("the step to continue from", torch.tensor([self.done]))
        return facts.get("data")

    @torch.no_grad()
    def _load(self, tensors: dict[str, dict[str, torch.Tensor]], facts: dict) -> None:
        weights = checkpoint.matched(tensors, "model", {name: parameter for parameter, name in self.names.items()})
        for parameter, name in self.names.items():
            parameter.copy_(distributed.shard_like(weights[name], parameter))
        if self.bank is not None:
            scales = tensors.get(_of_rank("scales", environment.rank()), tensors.get("scales", {}))
            self.bank.load_state_dict(scales, facts.get("scales"))
        self.done = facts["step"]
        self.final = self.done == self.cfg.steps
        if self.final:  # nothing follows
            return
        if self.bank is not None:
            distributed.refuse_other_world_size(self.cfg, facts.get("ranks", 1))
        checkpoint.load_optimizer(self.trainer.optimizer, self.names, tensors)
        device.set_rng_state(tensors.get(_of_rank("rng", environment.rank()), {}))

    def resumable(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return everything that a resume needs, gathered on the first rank."""
        tensors = self.trained() | {"optimizer": checkpoint.optimizer_tensors(self.trainer.optimizer, self.names)}
        own = {"rng": device.rng_state()}
        if self.bank is not None and self.cfg.scaling.sync == "none":
            own["scales"] = {name: tensor.cpu() for name, tensor in self.bank.state_dict().items()}
        for rank, groups in enumerate(distributed.all_gather_object(own)):
            tensors |= {_of_rank(name, rank): group for name, group in groups.items()}
        return tensors

    def trained(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return weights and scales, gathered on the first rank."""
        weights = {name: distributed.full_tensor_on_main(parameter) for parameter, name in self.names.items()}
        return {"model": weights} | ({} if self.bank is None else {"scales": self.bank.state_dict()})

    def facts(self, **more) -> dict:
        """Return what a checkpoint records beside tensors: its run, the names of its scales, the number of ranks."""
        names = self.bank.names if self.bank is not None else None
        return {"run": self.run.id, "scales": names, "ranks": environment.world_size(), **more}

    def check_agreement(self) -> None:
        """Raise `UserError` when the ranks have different scales, unless `scaling.sync=none` allows that."""
        if self.bank is not None and self.cfg.scaling.sync == "max":
            distributed.check_agreement("scales", self.bank.scale)


def _of_rank(name: str, rank: int) -> str:
    """Return the name in a checkpoint of a group of tensors that differs between ranks."""
    return f"{name}.{rank}" if rank else name
