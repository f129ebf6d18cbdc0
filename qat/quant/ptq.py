"""Methods of post-training quantization (PTQ): what is done to a trained model before it runs in W8A8.

A method changes the linears, which are plain then, or names scales; a scale that it does not name becomes
target / amax over the calibration text (`qat.quant.calibrate`), as with the method `max`. To add one, write a decorated
function here; `ptq.rungs=[<its name>]` then scores it. What NVIDIA's Model Optimizer has is taken from there
(`qat.quant.modelopt`). PyTorch is imported only within functions: checking a command line needs no more than the names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import ConfigError, nearest
from qat.quant.formats import FORMATS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qat.config import QuantConfig


@dataclass
class Calibration:
    """What a method works on.

    linears: those to quantize by name, each an `nn.Linear`; a method may change their weights in place.
    siblings: the names of the linears that read one input, a tuple an input.
    quant: format and targets. run: passes the calibration text through the model once.
    around: by linear, what runs in its place: (quantized linear, x [..., in]) -> y [..., out].
    scales: `<linear>/activation` or `<linear>/weight` -> 0-dim FP32, what is multiplied by before rounding.
    """

    linears: dict[str, nn.Linear]
    siblings: list[tuple[str, ...]]
    quant: QuantConfig
    run: Callable[[], None]
    around: dict[str, Callable] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def inputs(self, take: Callable[[str, torch.Tensor], Any]) -> dict[str, list]:
        """Return by linear what `take`, given its name and an input, makes of every batch."""
        taken: dict[str, list] = {name: [] for name in self.linears}

        def hook(name: str) -> Callable:
            return lambda _, arguments: taken[name].append(take(name, arguments[0].detach()))

        hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in self.linears.items()]
        self.run()
        for handle in hooks:
            handle.remove()
        return taken

    def smooth(self, factors: dict[str, torch.Tensor]) -> None:
        """Multiply the columns of inputs by FP32 [in] and divide those of weights. Siblings share their mean."""
        for group in self.siblings:
            shared = sum(factors[name] for name in group) / len(group)
            for name in group:
                self.linears[name].weight.data.div_(shared)
                self.around[name] = lambda linear, x, by=shared: linear((x * by).to(x.dtype))


class Method(NamedTuple):
    """A method.

    prepare: does it, with a `Calibration` and its number. number: (default, smallest, largest) of the one number that
    it takes; None: it takes none. needs_modelopt: whether it is NVIDIA's. saturates: whether values beyond the target
    are rounded as they are, up to the format's largest, and not clipped to it.
    """

    prepare: Callable[..., None]
    number: tuple[float, float, float] | None
    needs_modelopt: bool
    saturates: bool


METHODS: dict[str, Method] = {}


def method(number: tuple[float, float, float] | None = None, needs_modelopt: bool = False, saturates: bool = False):
    """Register a function as a method under its own name (see `Method`)."""

    def register(prepare):
        METHODS[prepare.__name__] = Method(prepare, number, needs_modelopt, saturates)
        return prepare

    return register


class Rung(NamedTuple):
    """A row of the ladder: a method with its number, in the run's format or in another one."""

    name: str
    method: str = "max"
    number: float | None = None
    format: str | None = None


def rung(name: str, key: str = "ptq.rungs") -> Rung:
    """Read an entry of a key: a method, as in smoothquant or smoothquant:0.3, or a format, for max calibration.

    Errors: ConfigError of one line.
    """
    word, colon, text = name.partition(":")
    if word in FORMATS and not colon:
        return Rung(name, format=word)
    if word not in METHODS:
        raise ConfigError(f"{key}={name}: unknown method; {nearest(word, [*METHODS, *FORMATS])}")
    number = METHODS[word].number
    if not colon:
        return Rung(name, word, number and number[0])
    if number is None:
        raise ConfigError(f"{key}={name}: {word} takes no number; write {word}")
    usual, low, high = number
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ConfigError(f"{key}={name}: {word} takes a number in [{low:g}, {high:g}], as in {word}:{usual:g}")
    return Rung(name, word, value)


def amax(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value, 0-dim FP32, and 1 where that is 0, which scales nothing."""
    largest = x.abs().amax().float()
    return largest.where(largest > 0, 1.0)


# ------------------------------------------------------------------------------------------- scales of tensors


@method()
def max(calibration: Calibration) -> None:
    """Scale every tensor by its largest value over the calibration text."""


@method(saturates=True)
def cast(calibration: Calibration) -> None:
    """Round activations as they are, and scale weights to 16: the vendor's default, without calibration (AMCT)."""
    import torch

    for name, linear in calibration.linears.items():
        calibration.scales[f"{name}/activation"] = torch.ones((), device=linear.weight.device)
        calibration.scales[f"{name}/weight"] = 16 / amax(linear.weight)


@method(saturates=True)
def quantile(calibration: Calibration) -> None:
    """Scale tensors to 16; of an activation 0.99 of a batch's largest value and 0.01 of those before (AMCT)."""
    for name, values in calibration.inputs(lambda _, x: amax(x)).items():
        running = values[0]
        for value in values[1:]:
            running = 0.99 * value + 0.01 * running
        calibration.scales[f"{name}/activation"] = 16 / running
        calibration.scales[f"{name}/weight"] = 16 / amax(calibration.linears[name].weight)


@method(saturates=True)
def ofmr(calibration: Calibration) -> None:
    """Choose scales of 2^-5 to 2^5 by the least output error on the first batch, each role by itself (AMCT)."""
    import torch
    from torch.nn import functional as F

    round_to, scales = FORMATS[calibration.quant.format].round, [2.0**power for power in range(-5, 6)]
    seen: set[str] = set()

    def errors(name: str, x: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if name in seen:  # the vendor's default, too, is one batch
            return None
        seen.add(name)
        x, weight = x.float(), calibration.linears[name].weight.float()

        def error(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return (F.linear(values, weight) - wanted).double().square().sum()

        with torch.autocast(x.device.type, enabled=False):
            wanted = F.linear(x, weight)
            return {
                "activation": torch.stack([error(round_to(x * s, "saturate") / s, weight) for s in scales]),
                "weight": torch.stack([error(x, round_to(weight * s, "saturate") / s) for s in scales]),
            }

    measured = {name: rows[0] for name, rows in calibration.inputs(errors).items()}
    for group in calibration.siblings:
        together = sum(measured[name]["activation"] for name in group)
        for name in group:
            for role, error in (("activation", together), ("weight", measured[name]["weight"])):
                calibration.scales[f"{name}/{role}"] = error.new_tensor(scales[int(error.argmin())]).float()


@method(needs_modelopt=True)
def mse(calibration: Calibration) -> None:
    """Scale weights by the amax, of 1/4 to 4 times their own in steps of 1/8, with the least squared error."""
    from qat.quant import modelopt

    steps = {"start_multiplier": 0.25, "stop_multiplier": 4.0, "step_size": 0.125}
    calibration.scales |= modelopt.weight_scales(calibration, {"method": "mse", **steps})


# ------------------------------------------------------------------------------------------- values of weights


@method(number=(0.5, 0.0, 1.0), needs_modelopt=True)
def smoothquant(calibration: Calibration, alpha: float) -> None:
    """Divide input columns by max|x|^alpha / max|w|^(1 - alpha), and multiply those of weights (arXiv 2211.10438)."""
    from qat.quant import modelopt

    calibration.smooth(modelopt.smoothing(calibration, {"method": "smoothquant", "alpha": alpha}))


@method(needs_modelopt=True)
def awq(calibration: Calibration) -> None:
    """Smooth as SmoothQuant, by mean|x| and mean|w|, with the exponent that keeps a linear's output best when its
    weight is rounded (arXiv 2306.00978, with weights in the factor)."""
    from qat.quant import modelopt

    calibration.smooth(modelopt.smoothing(calibration, {"method": "awq_lite"}))


@method(needs_modelopt=True)
def gptq(calibration: Calibration) -> None:
    """Round weights column by column, and let those that follow make up for the error (arXiv 2210.17323)."""
    from qat.quant import modelopt

    # Blocks change the time only: of 128 columns, the default, they take four times as long.
    calibration.scales |= modelopt.weight_scales(calibration, {"method": "gptq", "block_size": 32})


@method()
def rotation(calibration: Calibration) -> None:
    """Rotate inputs and weights by a Hadamard matrix, which spreads outliers over columns (arXiv 2404.00456)."""
    for name, linear in calibration.linears.items():
        linear.weight.data.copy_(rotated(linear.weight))
        calibration.around[name] = lambda linear, x: linear(rotated(x))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Multiply [..., in] by an orthonormal Hadamard matrix of the largest power of two that divides `in`, blockwise."""
    import torch

    size = x.shape[-1] & -x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        return (x.float().unflatten(-1, (-1, size)) @ _hadamard(size, x.device)).flatten(-2).to(x.dtype)


@functools.cache
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    import torch
    from scipy.linalg import hadamard

    return torch.tensor(hadamard(size), dtype=torch.float32, device=device) / size**0.5


# --------------------------------------------------------------------------------------- granularity and formats


@method()
def per_channel(calibration: Calibration) -> None:
    """Scale weights by output channel and activations by token."""

    def wrap(name: str, linear: nn.Linear) -> None:
        rows = linear.weight.data.abs().amax(1).float()
        rows, bias = rows.where(rows > 0, 1.0), linear.bias
        linear.weight.data.div_(rows[:, None])
        linear.bias = None

        def run(quantized: nn.Module, x: torch.Tensor) -> torch.Tensor:
            tokens = x.abs().amax(-1, keepdim=True).float()
            tokens = tokens.where(tokens > 0, 1.0)
            y = quantized((x / tokens).to(x.dtype))
            y = (y.float() * tokens * rows).to(y.dtype)
            return y if bias is None else y + bias

        calibration.around[name] = run

    for name, linear in calibration.linears.items():
        wrap(name, linear)


@method(number=(6.0, 0.0, float("inf")))
def llm_int8(calibration: Calibration, threshold: float) -> None:
    """Leave the columns in which an input reaches a threshold in BF16, weights and all (arXiv 2208.07339)."""
    from torch.nn import functional as F

    columns = calibration.inputs(lambda _, x: x.abs().flatten(0, -2).amax(0) >= threshold)
    for name, linear in calibration.linears.items():
        outside = sum(columns[name]) > 0
        in_bf16 = linear.weight.data[:, outside].clone()
        linear.weight.data[:, outside] = 0

        def run(quantized, x, outside=outside, in_bf16=in_bf16):
            return quantized(x.masked_fill(outside, 0)) + F.linear(x[..., outside], in_bf16)

        if outside.any():
            calibration.around[name] = run


@method()
def int8(calibration: Calibration) -> None:
    """Round to the integers up to 127, scaled by the largest value of a tensor."""
    import torch
    from torch.nn import functional as F

    largest = calibration.inputs(lambda _, x: amax(x))
    for name, linear in calibration.linears.items():
        by_input, by_weight = 127 / torch.stack(largest[name]).amax(), 127 / amax(linear.weight)
        linear.weight.data.copy_((linear.weight * by_weight).round())

        def run(quantized, x, by_input=by_input, by_weight=by_weight):
            integers = (x * by_input).round().clamp(-127, 127).to(x.dtype)
            y = F.linear(integers, quantized.weight)
            y = (y.float() / (by_input * by_weight)).to(y.dtype)
            return y if quantized.bias is None else y + quantized.bias

        calibration.around[name] = run


@method()
def mxfp8(calibration: Calibration) -> None:
    """Round to E4M3 with a power of two as the scale of every 32 neighbours (OCP Microscaling formats, 1.0)."""
    from torch.nn import functional as F

    for name, linear in calibration.linears.items():
        linear.weight.data.copy_(rounded_to_mxfp8(linear.weight))
        calibration.around[name] = lambda linear, x: F.linear(rounded_to_mxfp8(x), linear.weight, linear.bias)


def rounded_to_mxfp8(x: torch.Tensor) -> torch.Tensor:
    """Round [..., in] to MXFP8 (E4M3), in its shape and dtype; the last block may be shorter than 32."""
    from torch.nn import functional as F

    padded = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    exponent = padded.abs().amax(-1, keepdim=True).frexp().exponent - 1 - 8  # 2^8: of the largest E4M3 value
    rounded = FORMATS["fp8_e4m3"].round(padded.ldexp(-exponent), "saturate").ldexp(exponent)
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
