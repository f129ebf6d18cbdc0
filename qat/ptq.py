"""Post-training quantization (PTQ): the matched baseline's weights in W8A8 without QAT, to show what QAT is good for.

Static max calibration: the first training text passes through the unquantized model, the largest absolute value of each
tensor counts, and target / amax is its scale from then on, whatever scaling the run has that it is compared with.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from qat import data, runtime
from qat.config import Config, ScalingConfig
from qat.identity import baseline_of
from qat.scaling import ScaleBank

SEQUENCES = 16  # of the run's first training text that calibrate, at its own length, in its own micro-batches


def ptq_of(cfg: Config) -> Config:
    """The PTQ beside a quantized run: its baseline under its quantization."""
    ptq = baseline_of(cfg)
    ptq.quant = copy.deepcopy(cfg.quant)
    return calibrated(ptq)


def calibrated(cfg: Config) -> Config:
    """A quantized run under PTQ's scales in the place of its own, which tells its weights from its scales."""
    found = copy.deepcopy(cfg)
    # A bank that observes while nothing is quantized, and whose scale is what it observed.
    found.scaling = ScalingConfig(algo="most_recent", observe_in_warmup=True, discard_after_warmup=False)
    return found


@torch.no_grad()
def calibrate(model: nn.Module, bank: ScaleBank, cfg: Config, tokenizer) -> None:
    """Set the scales of a new bank of a converted model, which is in eval mode and not quantizing yet (`Phase.OFF`).

    cfg: of `calibrated`. Only weights and activations are seen: there is no backward pass. Errors: UserError when the
    training text cannot be read.
    """
    once = dataclasses.replace(cfg.data, duplicate_workers=1)
    stream, (micro, _) = data.stream(once, cfg.seed, tokenizer), cfg.batch
    for done in range(0, SEQUENCES, micro):
        tokens = stream.micro_batch(min(micro, SEQUENCES - done), cfg.budget.seq_len).to(runtime.device())
        model.get_decoder()(input_ids=tokens[:, :-1], use_cache=False)  # the head is never quantized
    bank.commit(step=1)
