"""Ask NVIDIA's Model-Optimizer (the extra `ptq`) which linears are sensitive, beside our own measurement."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from qat.config import QuantConfig
from qat.quant import modelopt


def installed() -> bool:
    """Return whether Model-Optimizer is installed; print a line where it is not."""
    found = importlib.util.find_spec("modelopt") is not None
    if not found:
        print("Model-Optimizer is not installed, and left out: pip install -e '.[ptq]'", flush=True)
    return found


def scores(
    model: nn.Module, rounded: Collection[str], quant: QuantConfig, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """Return the gradient score of `auto_quantize` for each linear, or for the first of those that it rounds alike.

    The score is the sum of squares of the gradient times what rounding does to the linear's output: the rise of the
    loss to second order. model: unquantized; it is changed. rounded: names of the linears that are rounded. batches:
    (tokens, labels), int64, that calibrate, too.
    """
    with modelopt.silent():
        import modelopt.torch.quantization as library

        roles = zip(modelopt.quantizers(quant), (quant.weights, quant.activations), strict=True)
        quantizers = [{"quantizer_name": "*", "enable": False}, *(role for role, enabled in roles if enabled)]
        _, state = library.auto_quantize(
            model,
            constraints={"effective_bits": 16.0},  # only its scores are asked for
            quantization_formats=[{"quant_cfg": quantizers, "algorithm": "max"}],
            data_loader=batches,
            forward_step=lambda model, batch: model(input_ids=batch[0], use_cache=False).logits,
            loss_func=lambda logits, batch: F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()),
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            disabled_layers=[n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in rounded],
        )
    found = state["candidate_stats"].items()
    return {name.removesuffix(".quant_recipe"): max(choices["scores"]) for name, choices in found}
