"""Switch the rounding of single tensors off, to see what damage the rest does."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

from qat.quant.linear import QuantizedLinear
from qat.quant.matmul import Rounded


@contextlib.contextmanager
def only(linears: Iterable[QuantizedLinear], active: Collection[int]) -> Iterator[None]:
    """Round only the tensors with these indices in the bank, within this context; for forward passes alone.

    linears: all quantized linears of a model whose bank is frozen. One that rounds neither its input nor its weight is
    then `nn.Linear`, bit for bit.
    """
    linears = list(linears)
    shared = {id(quantizer): quantizer for linear in linears for quantizer in linear.quantizers.values()}
    enabled = [(quantizer, quantizer.enabled) for quantizer in shared.values()]
    weights = [(linear, linear.rounded_weight) for linear in linears]
    plain = []
    try:
        for quantizer, before in enabled:
            quantizer.enabled = before and quantizer.index in active
        for linear, rounded in weights:
            if not any(quantizer.enabled for quantizer in linear.quantizers.values()):
                linear.forward = linear._unquantized
                plain.append(linear)
            elif rounded is not None and not linear.quantizers["weight"].enabled:
                linear.rounded_weight = Rounded(linear.weight.to(rounded.values.dtype))
        yield
    finally:
        for quantizer, before in enabled:
            quantizer.enabled = before
        for linear, rounded in weights:
            linear.rounded_weight = rounded
            linear.input._source = linear.input._rounded = None  # not all that share an input may have read it
        for linear in plain:
            del linear.forward
