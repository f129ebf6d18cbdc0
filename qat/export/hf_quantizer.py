"""Models with linears in 8-bit codes, as transformers' quantization method `hif8`.

    y = round(x * input_scale) @ decode(weight)^T / (input_scale * weight_scale) + bias

Scales multiply before rounding, so the value of a weight is decode(code) / weight_scale. The products of given inputs
are those of W8A8 evaluation (`qat.quant.matmul`), bit for bit. Once this module is imported,
`AutoModelForCausalLM.from_pretrained` loads a folder that `qat.export.export` wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.config import QuantConfig
from qat.quant.formats import FORMATS, to_e4m3
from qat.quant.kernels import dispatch
from qat.quant.matmul import Matmul, Rounded
from qat.quant.scaling import to_scale

METHOD = "hif8"
VERSION = 1  # of the folder's format
SCHEMES = ("static", "dynamic")


@register_quantization_config(METHOD)
@dataclass(kw_only=True)
class CodesConfig(QuantConfig, QuantizationConfigMixin):
    """The `quantization_config` of an exported config.json: the run's `quant` group, and what describes the codes.

    modules: names of the quantized linears. activation_scheme: "static": inputs have a fixed `input_scale`; "dynamic":
    they scale by their own amax (2^guard times it), and by `input_scale` where that is 0 or not finite. arithmetic:
    "bf16" or "fp32", of the run's products. run: its id.
    """

    quant_method: str = METHOD
    version: int = VERSION
    modules: list[str] = field(default_factory=list)
    activation_scheme: str = "static"
    guard: float = 0.0
    arithmetic: str = "bf16"
    run: str = ""
    scale_convention: str = "scales multiply before rounding: a value is decode(code) / scale"

    def __post_init__(self):
        if self.version > VERSION:
            raise ValueError(f"version {self.version} of the format, and this code reads up to {VERSION}")
        if self.format not in FORMATS or self.activation_scheme not in SCHEMES or not self.modules:
            raise ValueError("its quantization_config names no known format, activation_scheme or modules")


class HiF8Linear(nn.Module):
    """The linear of an exported model, for inference only.

    weight: uint8 codes [out, in], or with quant.weights=false the parameter of `linear`. Codes are decoded in each
        call, which takes a byte a weight in memory, but makes generation, token by token, slower.
    weight_scale, input_scale: 0-dim FP32.
    Codes and scales are placeholders until they are loaded.
    """

    def __init__(self, linear: nn.Linear, config: CodesConfig):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.config, self.matmul = config, Matmul(config)
        device = linear.weight.device
        if config.weights:
            self.weight = nn.Buffer(torch.zeros(linear.weight.shape, dtype=torch.uint8, device=device))
            self.weight_scale = nn.Buffer(torch.ones((), dtype=torch.float32, device=device))
        else:
            self.weight = linear.weight
        if config.activations:
            self.input_scale = nn.Buffer(torch.ones((), dtype=torch.float32, device=device))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features] in the dtype of `x`, BF16 or FP32."""
        rows = x.reshape(-1, self.in_features)
        y = self.matmul.outputs(self._input(rows), self._weight(x.dtype), x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _input(self, rows: torch.Tensor) -> Rounded:
        c = self.config
        if not c.activations:
            return Rounded(rows)
        scale, target = self.input_scale, c.target_activation
        if c.activation_scheme == "dynamic":
            scale = to_scale(dispatch.amax(rows), torch.full_like(scale, target / 2**c.guard), scale)
        output = "e4m3" if c.gemm == "fp8" else "values"
        return Rounded(*dispatch.quantize(rows, scale, None, c.format, c.overflow, target, output), scale)

    def _weight(self, dtype: torch.dtype) -> Rounded:
        c = self.config
        if not c.weights:
            return Rounded(self.weight.to(dtype))
        values = dispatch.decode(self.weight, c.format, dtype)
        return Rounded(values, to_e4m3(values) if c.gemm == "fp8" else None, self.weight_scale)

    def _apply(self, fn, recurse=True):
        """Keep scales in FP32 whatever dtype the model is converted to: BF16 would change them by up to 0.4 %."""
        scales = {k: b for k, b in self._buffers.items() if b.dtype is torch.float32 and not b.is_meta}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            self._buffers[name] = scale.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.config.format}"


def swap_linears(model: nn.Module, config: CodesConfig) -> dict[str, HiF8Linear]:
    """Replace the linears that `config` names by empty `HiF8Linear`s; returns these by name.

    Errors: ValueError for a name without a linear.
    """
    swapped = {}
    for name in config.modules:
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the model has no {name}") from error
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is no linear of the model")
        swapped[name] = HiF8Linear(linear, config)
        model.set_submodule(name, swapped[name])
    return swapped


@register_quantizer(METHOD)
class CodesQuantizer(HfQuantizer):
    """Let transformers load, and save again, what `qat.export.export` wrote."""

    requires_calibration = True  # transformers cannot quantize a checkpoint by this method, only load one
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **_) -> None:
        swap_linears(model, self.quantization_config)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model, **_) -> None:
        for name, tensor in model.state_dict().items():  # transformers does not check shapes of quantized models
            if tensor.shape != self._shapes[name]:
                raise ValueError(f"{name} is {list(tensor.shape)}, config.json makes it {list(self._shapes[name])}")
