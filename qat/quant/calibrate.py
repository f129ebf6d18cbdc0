"""Post-training quantization (PTQ): the baseline's weights in W8A8 without QAT, to show what QAT gains.

Static max calibration: training text passes through the unquantized model, and each tensor's scale is target / amax
from then on, whatever scaling rule the compared run has.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qat.quant.scaling import ScaleBank


@torch.no_grad()
def calibrate(model: nn.Module, bank: ScaleBank, batches: Iterable[torch.Tensor]) -> None:
    """Set the scales of weights and activations of a converted model in eval mode.

    bank: new, and one that records while it does not quantize (`qat.runs.identity.with_ptq_scales`). batches: int64
    tokens [sequences, length] on the model's device.
    """
    for tokens in batches:
        model.get_decoder()(input_ids=tokens, use_cache=False)  # the head is never quantized
    bank.tick()
