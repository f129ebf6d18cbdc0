"""A model to score: which weights, and how its linears run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qat.config import Config
from qat.data import packing
from qat.errors import UserError
from qat.eval import arithmetic
from qat.models.load import load_model, store_in_bf16
from qat.quant.calibrate import prepare
from qat.quant.convert import convert, quantized_linears
from qat.quant.linear import round_weights
from qat.quant.ptq import Rung
from qat.runs.folder import Run
from qat.runs.identity import is_ptq
from qat.train import checkpoint
from qat.utils import device

_MAX = Rung("max")
CALIBRATION_SEQUENCES = 16  # of the run's first training text that calibrate PTQ, in the run's own micro-batches


@dataclass
class Subject:
    """One model to score: its configuration, the run folder with its weights, and how its linears run."""

    cfg: Config
    run: Run
    # bf16, or of the pretrained checkpoint `qat.runs.identity.pretrained_mode`; w8a8, with the run's own scales;
    # `qat.runs.identity.ptq_mode`, with calibrated ones; control, with 4-bit weights, which any measure that is worth
    # its name must see
    mode: str
    rung: Rung = _MAX  # how it is calibrated
    unusual: dict = dataclasses.field(default_factory=dict)  # what makes its calibration another one than usual
    asked: bool = True  # whether it answers the benchmark's questions
    calibration_seconds: float | None = None  # once it is built

    @property
    def trained(self) -> bool:
        return self.cfg.budget.steps > 0

    @property
    def calibrated(self) -> bool:
        return is_ptq(self.mode)

    @property
    def compared(self) -> bool:
        """Return whether it is set beside the matched baseline, prediction by prediction."""
        return self.cfg.quantized or self.mode == "control"

    def build(self) -> tuple[nn.Module, object]:
        """Return (the model in eval mode, its tokenizer). Errors: UserError when the run is not finished."""
        model, tokenizer = load_model(self.cfg.model, self.cfg.seed)
        tensors, facts = self._checkpoint() if self.trained else ({}, {})
        if self.trained:
            if self.cfg.optim.pure_bf16:
                store_in_bf16(model)
            # Parameters only: rotary frequencies must stay FP32, as they are in training.
            parameters = dict(model.named_parameters())
            with checkpoint.restoring(self.run.checkpoints):
                saved = checkpoint.matched(tensors, "model", parameters)
            for name, parameter in parameters.items():
                parameter.data = saved[name].detach().to(parameter.device)
        how = arithmetic.name(self.cfg)
        arithmetic.store(model, how)
        model.eval()
        if self.mode == "control":
            _round_to_4_bits(model)
        elif self.mode == "w8a8" or self.calibrated:
            self._quantize(model, tokenizer, how, tensors, facts)
        if how == "training":
            model.set_output_embeddings(arithmetic.FP32Head(model.get_output_embeddings()))
        return model, tokenizer

    def _quantize(self, model: nn.Module, tokenizer, how: str, tensors: dict, facts: dict) -> None:
        """Swap in quantized linears, with the checkpoint's scales or calibrated ones, and weights rounded once."""
        if self.calibrated:
            batches, started = calibration_batches(self.cfg, tokenizer), time.perf_counter()
            with arithmetic.autocast(how):
                bank = prepare(model, self.cfg, self.rung, batches)
            self.calibration_seconds = round(time.perf_counter() - started, 1)
        else:
            bank, _ = convert(model, self.cfg)
            with checkpoint.restoring(self.run.checkpoints):
                bank.load_state_dict(tensors.get("scales", {}), facts.get("scales"))
        bank.freeze()
        round_weights(quantized_linears(model).values(), arithmetic.products(how))

    def check(self) -> None:
        """Raise `UserError` when there is nothing to score yet, or no longer what it was made of."""
        if self.trained and not self.run.finished:
            state = self.run.status()
            progress = f"at step {state['step']} of {state['steps']}" if state else "not started"
            raise UserError(
                f"{self.run.id} is {progress}; train it first: `python scripts/train.py` with the same overrides"
            )
        self.run.check_sources(self.cfg)

    def check_checkpoint(self) -> None:
        """Raise `UserError` when the weights to score are gone."""
        if self.trained and not any(self.run.checkpoints.glob("step-*")):
            raise UserError(
                f"{self.run.path}: its checkpoint is gone, and what is asked is not scored yet; train it again by "
                f"`python scripts/train.py` with the same overrides and retrain=true"
            )

    def _checkpoint(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        self.check()
        self.check_checkpoint()
        return checkpoint.latest(self.run.checkpoints, self.run.id)


@torch.no_grad()
def _round_to_4_bits(model: nn.Module) -> None:
    """Round the weights of all linears but the head to 4 bits in place: integers up to 7 times a scale a row."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            scale = module.weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            module.weight.copy_((module.weight.float() / scale).round() * scale)


def calibration_size(cfg: Config) -> tuple[int, int]:
    """Return how many training sequences calibrate a PTQ, and how many tokens each has."""
    return cfg.ptq.sequences or CALIBRATION_SEQUENCES, cfg.ptq.tokens or cfg.budget.seq_len


def calibration_text(cfg: Config) -> list:
    """Return what names the text that calibrates, where no run's id does."""
    data, budget = cfg.data, cfg.budget
    return [data.path, data.subset, data.revision, cfg.seed, budget.seq_len, budget.micro_batch]


def calibration_batches(cfg: Config, tokenizer) -> Iterator[torch.Tensor]:
    """Yield the first training sequences of a run, int64 [sequences, length]. Errors: UserError when the text cannot be
    read."""
    sequences, length = calibration_size(cfg)
    once = dataclasses.replace(cfg.data, duplicate_workers=1)
    stream, (micro, _) = packing.training_stream(once, cfg.seed, tokenizer), cfg.batch
    for done in range(0, sequences, micro):
        batch = stream.micro_batch(min(micro, sequences - done), length)
        yield batch.to(device.get_device())[:, :-1]
