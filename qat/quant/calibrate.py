"""Post-training quantization (PTQ): the matched baseline's weights in W8A8 without QAT, to show what QAT is good for.

Static max calibration: the first training text passes through the unquantized model, the largest absolute value of each
tensor counts, and target / amax is its scale from then on, whatever scaling the run has that it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qat.quant.scaling import ScaleBank


@torch.no_grad()
def calibrate(model: nn.Module, bank: ScaleBank, batches: Iterable[torch.Tensor]) -> None:
    """Set the scales of a new bank of a converted model, which is in eval mode and not quantizing yet.

    bank: one that observes while it is off (`qat.runs.identity.with_ptq_scales`). batches: int64 tokens [sequences,
    length] on the model's device. Only weights and activations are seen: there is no backward pass.
    """
    for tokens in batches:
        model.get_decoder()(input_ids=tokens, use_cache=False)  # the head is never quantized
    bank.tick()
