"""NVIDIA's Model Optimizer (the extra `ptq`) as the implementation of PTQ methods, on this project's grids.

It reads and changes the linears; what it finds then runs in our own quantized linear, like any other scales.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from qat.config import QuantConfig
from qat.quant.formats import FORMATS
from qat.quant.kernels import dispatch
from qat.quant.ptq import Calibration, amax
from qat.quant.scaling import to_scale


def weight_scales(calibration: Calibration, algorithm: Mapping) -> dict[str, torch.Tensor]:
    """Return the scales of weights that an algorithm finds; it may change the weights."""
    _calibrate(calibration, algorithm)
    target = torch.tensor(calibration.quant.target_weight)
    return {
        f"{name}/weight": to_scale(linear.weight_quantizer.amax.float(), target, torch.ones(()))
        for name, linear in calibration.linears.items()
    }


def smoothing(calibration: Calibration, algorithm: Mapping) -> dict[str, torch.Tensor]:
    """Return what an algorithm multiplies the input of each linear by, FP32 [in]; weights stay as they are."""
    before = {name: linear.weight.detach().clone() for name, linear in calibration.linears.items()}
    _calibrate(calibration, algorithm)
    for name, linear in calibration.linears.items():
        linear.weight.data.copy_(before[name])
    return {name: linear.input_quantizer.pre_quant_scale.float() for name, linear in calibration.linears.items()}


@contextlib.contextmanager
def silent():
    """Say nothing of what the library warns of and reports, while it is imported and works."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def quantizers(quant: QuantConfig) -> list[dict]:
    """Return what the library rounds, weights and inputs, and how: by our own rounding, registered as its backend."""
    from modelopt.torch.quantization.nn import is_registered_quant_backend, register_quant_backend
    from modelopt.torch.quantization.utils.calib_utils import GPTQHelper, gptq_blockwise_update, register_gptq_helper

    class Columns(GPTQHelper):
        """Round the columns that are asked for: the library rounds all of them for each."""

        def _blockwise_update(self, block_size):
            quantizer = self.module.weight_quantizer
            gptq_blockwise_update(self.weight, self.h_inv, block_size, lambda w: _RoundedColumn(w, quantizer))

    if not is_registered_quant_backend(quant.format):
        register_quant_backend(quant.format, _round)
        register_gptq_helper(quant.format, Columns)
    how = {"num_bits": 8, "axis": None, "backend": quant.format}
    weight, activation = (
        how | {"backend_extra_args": {"overflow": quant.overflow, "target": target}}
        for target in (quant.target_weight, quant.target_activation)
    )
    return [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": quant.weights},
        {"quantizer_name": "*input_quantizer", "cfg": activation, "enable": quant.activations},
    ]


def _calibrate(calibration: Calibration, algorithm: Mapping) -> None:
    """Convert the linears in place and run one of the library's algorithms on them."""
    with silent():
        import modelopt.torch.quantization as library

        # Only these are converted, and the whole model runs: it has these very linears.
        chosen = nn.ModuleDict({name.replace(".", "/"): linear for name, linear in calibration.linears.items()})
        how = {"quant_cfg": quantizers(calibration.quant), "algorithm": dict(algorithm)}
        library.quantize(chosen, how, lambda _: calibration.run())


def _round(x: torch.Tensor, quantizer) -> torch.Tensor:
    """Round as our own linears do, and divide by the scale: what the library calls a backend."""
    how = quantizer.backend_extra_args
    largest = amax(x) if quantizer.amax is None else quantizer.amax.float()
    scale = to_scale(largest, torch.tensor(how["target"]), torch.ones(()))
    if x.dim() == 1:  # a column of GPTQ: starting threads would take longer
        values = FORMATS[quantizer.backend].quantize(x.float() * scale, how["overflow"], how["target"])
    else:
        values, _ = dispatch.quantize(x, scale, None, quantizer.backend, how["overflow"], how["target"], "values")
    return (values.float() / scale).to(x.dtype)


class _RoundedColumn:
    """The rounded columns of a matrix, of which one is read, twice."""

    def __init__(self, matrix: torch.Tensor, round_column):
        self.matrix, self.round_column, self.column = matrix, round_column, None

    def __getitem__(self, place) -> torch.Tensor:
        if self.column is None:
            self.column = self.round_column(self.matrix[place])
        return self.column
