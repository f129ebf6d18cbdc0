"""Emulate the products of quant.gemm=fp8 on an H100, and say how far they are from the products of HiF8 values.

FP8 tensor cores add products of E4M3 values with fewer bits than FP32. `mmaemu` (PyPI, Apache-2.0) reproduces an H100
PCIe's sums bit for bit, on a CPU.
"""

from __future__ import annotations

import importlib.util

import torch

from qat.errors import ConfigError
from qat.quant.formats import E4M3_FACTOR, FORMATS, to_e4m3

LENGTHS = (576, 1536, 6144)  # terms of a sum: widths of SmolLM2-135M and openPangu-1B, and the latter's MLP
ROWS = 64


def check() -> None:
    if importlib.util.find_spec("mmaemu") is None:
        raise ConfigError("bench.parts=products: mmaemu is not installed; pip install --no-deps mmaemu==0.1.0")


def errors(length: int, spread: float) -> dict[str, float]:
    """Return {how it is computed: RMS error / RMS of the exact product} of x @ w^T, [64, length] times [64, length].

    Both are normal and rounded to HiF8 with a scale of 15 / amax; x is times exp(spread * a normal number).
    """
    import mmaemu

    generator = torch.Generator().manual_seed(0)
    x, w, logarithms = (torch.randn(ROWS, length, generator=generator) for _ in range(3))
    x = x * (spread * logarithms).exp()
    x, w = (FORMATS["hif8"].quantize(t * (15 / t.abs().max()), "clip", 15.0) for t in (x, w))
    codes = [to_e4m3(t).view(torch.float8_e4m3fn) for t in (x, w)]
    exact = x.double() @ w.double().t()

    def error(product: torch.Tensor) -> float:
        return ((product.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    def emulated(fast: bool) -> torch.Tensor:
        return mmaemu.accumulate(*codes, use_fast_accum=fast, splitk=1) / E4M3_FACTOR**2

    return {
        "operands in E4M3, exact sum": error(codes[0].double() @ codes[1].double().t() / E4M3_FACTOR**2),
        "FP8 on an H100": error(emulated(fast=False)),
        "FP8 on an H100, fast accumulation": error(emulated(fast=True)),
        "FP32 sum": error(x @ w.t()),
        "exact, rounded to BF16": error(exact.bfloat16()),
    }
