"""Post-training quantization (PTQ): the baseline's weights in W8A8 without QAT, to show what QAT gains.

Static max calibration: training text passes through the unquantized model, and each tensor's scale is target / amax
from then on, whatever scaling rule the compared run has. `qat.quant.ptq` has what may be done before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from qat.config import Config
from qat.quant.convert import convert, same_inputs, select
from qat.quant.ptq import METHODS, Calibration, Rung
from qat.quant.scaling import ScaleBank


@torch.no_grad()
def calibrate(model: nn.Module, bank: ScaleBank, batches: Iterable[torch.Tensor]) -> None:
    """Set the scales of weights and activations of a converted model in eval mode.

    bank: new, and one that records while it does not quantize (`qat.runs.identity.with_ptq_scales`). batches: int64
    tokens [sequences, length] on the model's device.
    """
    _run(model, batches)
    bank.tick()


def _run(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    for tokens in batches:
        model.get_decoder()(input_ids=tokens, use_cache=False)  # the head is never quantized


class Around(nn.Module):
    """A function that runs in the place of a quantized linear, which it is given with the input."""

    def __init__(self, linear: nn.Module, function: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.linear, self.function = linear, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear, x)


@torch.no_grad()
def prepare(model: nn.Module, cfg: Config, rung: Rung, batches: Iterable[torch.Tensor]) -> ScaleBank:
    """Convert a model in eval mode for `cfg` by a PTQ method; returns the bank, with its scales.

    batches: as in `calibrate`.
    """
    method, linears, batches = METHODS[rung.method], select(model, cfg), list(batches)
    if method.saturates:
        cfg = dataclasses.replace(cfg, quant=dataclasses.replace(cfg.quant, overflow="saturate"))
    calibration = Calibration(linears, same_inputs(linears), cfg.quant, functools.partial(_run, model, batches))
    method.prepare(calibration, *([] if rung.number is None else [rung.number]))
    bank, _ = convert(model, cfg)
    for name, function in calibration.around.items():
        model.set_submodule(name, Around(model.get_submodule(name), function))
    if any(name not in calibration.scales and not name.endswith("/gradient") for name in bank.names):
        calibrate(model, bank, batches)
    bank.set_scales(calibration.scales)
    return bank
