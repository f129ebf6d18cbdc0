"""Ask NVIDIA's Model-Optimizer (the extra `ptq`) which blocks are sensitive, beside our own measurement."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from qat.eval.subject import Subject
from qat.quant import modelopt


def scores(
    subject: Subject, rounded: Mapping[str, int], batches: Sequence[tuple[torch.Tensor, ...]]
) -> dict[str, float] | str:
    """Return the gradient score of `auto_quantize` for each block; why it has none, where it has none.

    The score is the sum of squares of the gradient times what rounding does to the linear's output: the rise of the
    loss to second order. subject: unquantized. rounded: the block of every linear that is rounded. batches: (tokens,
    labels), int64, that calibrate, too.
    """
    if not importlib.util.find_spec("modelopt"):
        return "it is not installed: pip install -e '.[ptq]'"
    model, _ = subject.build()
    with modelopt.silent():
        import modelopt.torch.quantization as library

        try:
            _, state = library.auto_quantize(
                model,
                constraints={"effective_bits": 16.0},  # only its scores are asked for
                quantization_formats=[{"quant_cfg": modelopt.quantizers(subject.cfg.quant), "algorithm": "max"}],
                data_loader=batches,
                forward_step=lambda model, batch: model(input_ids=batch[0], use_cache=False).logits,
                loss_func=lambda logits, batch: F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()),
                num_calib_steps=len(batches),
                num_score_steps=len(batches),
                disabled_layers=[n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in rounded],
            )
        except (AssertionError, RuntimeError, ValueError) as error:  # its own, of a model or format that it cannot do
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    totals: dict[str, float] = defaultdict(float)
    for name, choices in state["candidate_stats"].items():  # of linears that it rounds alike, the first
        if (linear := name.removesuffix(".quant_recipe")) in rounded:
            totals[str(rounded[linear])] += float(max(choices["scores"]))
    return totals or "it scores none of these linears"
