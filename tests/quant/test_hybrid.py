"""Hybrid rounding against its rule in plain Python, what it is for, and that only gradients are rounded so."""

import math

import pytest
import torch

from qat.models.load import load_model
from qat.quant import hif8
from qat.quant.convert import convert, quantized_linears
from qat.quant.formats import FORMATS
from qat.quant.kernels import dispatch
from tests.helpers.hif8_inputs import ALL_BF16, hard_values


def by_the_rule(value: float, mantissa_bits: int, overflow: str) -> float:
    """HR of one finite number whose source has so many mantissa bits, 23 or 7."""
    size = abs(value)
    if size < 2.0**-23:
        return 0.0
    exponent = math.frexp(size)[1] - 1
    kept = sum(abs(exponent) < limit for limit in (4, 8, 16))  # bits of the mantissa
    step = 2.0 ** max(exponent - kept, -22)
    below = math.floor(size / step) * step
    dropped = (size - below) / step  # a share of the step, without error
    mantissa = int((size / 2.0**exponent - 1) * 2**mantissa_bits)
    if abs(exponent) < 4:
        away = dropped >= 0.5
    elif mantissa_bits == 23:
        away = math.floor(dropped * 2**14) >= mantissa % 2**14
    else:
        away = math.floor(dropped * 4) >= 2 * (mantissa % 2) + 1
    rounded = below + away * step
    if size >= 1.25 * 2**15 or rounded > 2**15:
        rounded = math.inf if overflow == "inf" else 2.0**15
    return math.copysign(rounded, value) if rounded else 0.0


def random_values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20_000, generator=generator) * torch.exp2(torch.randint(-26, 18, (20_000,), generator=generator))


@pytest.mark.parametrize("overflow", hif8.OVERFLOWS)
@pytest.mark.parametrize(
    "x", [ALL_BF16, ALL_BF16.float(), hard_values(), random_values()], ids=["BF16", "BF16 as FP32", "edges", "random"]
)
def test_the_rule_bit_for_bit(x, overflow):
    x = x[x.isfinite()]
    rounded = hif8.fake_quantize_hybrid(x, overflow)
    bits = 7 if x.dtype is torch.bfloat16 else 23
    expected = torch.tensor([by_the_rule(value, bits, overflow) for value in x.tolist()])
    assert rounded.dtype is x.dtype and torch.equal(rounded.float(), expected)
    assert not rounded[rounded == 0].signbit().any()
    assert torch.equal(rounded.float(), hif8.fake_quantize(rounded.float(), overflow))  # values of the format


def test_landmarks():
    """As the reference conversions in Huawei's CANN have them."""
    largest_threshold = 1 + (2**14 - 1) / 2**23
    x = torch.tensor([15.5, 16.0, -16.0, 16 * largest_threshold, 2.0**-23, 34816.0, math.inf, math.nan])
    expected = torch.tensor([16.0, 20.0, -20.0, 16.0, 2.0**-22, math.inf, math.inf, math.nan])
    assert hif8.encode(hif8.fake_quantize_hybrid(x)).tolist() == hif8.encode(expected).tolist()
    assert hif8.fake_quantize_hybrid(torch.tensor([16.0]).half()).item() == 16.0


@pytest.mark.parametrize(("low", "step"), [(16.0, 4.0), (256.0, 128.0), (2.0**-5, 2.0**-7), (2.0**-12, 2.0**-13)])
def test_it_is_nearly_unbiased_where_rounding_to_nearest_is_not(low, step):
    generator = torch.Generator().manual_seed(1)
    x = low + step * (0.25 + 0.1 * torch.rand(40_000, generator=generator))  # all of it in a step's lower half
    hybrid, nearest = (
        ((function(x) - x) / step).mean() for function in (hif8.fake_quantize_hybrid, hif8.fake_quantize)
    )
    assert nearest == pytest.approx(-0.3, abs=0.01)
    assert abs(hybrid) < 4 * 0.5 / math.sqrt(len(x))  # four standard errors at most


def test_bf16_values_round_away_under_a_scale_that_is_a_power_of_two():
    """Their last bits are zero then. With a target that BF16 does not hold no amax makes such a scale."""
    x = (1 + torch.arange(128) / 128).bfloat16()

    def biases(target: float) -> torch.Tensor:
        """Mean errors of values beyond 16, in steps of HiF8, for every mantissa of the amax."""
        means = []
        for amax in x.float():
            scale = 32 * target / amax / 2.0 ** math.floor(math.log2(target))  # 16 to 64
            values, _ = dispatch.quantize(x, scale, None, "hif8", "saturate", target, "values", "hybrid")
            scaled = x.float() * scale
            step = torch.exp2(scaled.log2().floor() - 2)
            means.append(((values.float() - scaled) / step).mean())
        return torch.stack(means)

    of_224 = biases(224.0)
    assert of_224[96] > 0.5  # 1.75: 224 / 1.75 = 2^7, and all values round away
    assert of_224.mean().abs() < 0.04 and biases(223.9).abs().max() < 0.2


def test_kernels_and_statistics_round_by_it():
    x, scale = random_values(), torch.tensor(0.37)
    expected = FORMATS["hif8"].quantize(x * scale, "clip", 224.0, "hybrid")
    values, codes = dispatch.quantize(x, scale, None, "hif8", "clip", 224.0, "codes", "hybrid")
    assert torch.equal(values, expected) and torch.equal(hif8.decode(codes), expected)
    noise = (x * scale - expected).double().square().sum()
    assert dispatch.statistics(x, scale, "hif8", "clip", 224.0, "hybrid")[9] == noise


def test_only_gradients_are_rounded_so(config):
    products = {}
    for rounding in ("nearest", "hybrid"):
        cfg = config("experiment=exp5", **{"quant.rounding": rounding})
        model, _ = load_model(cfg.model, seed=0)
        convert(model, cfg)[0].begin_step(1, 1)
        loss = model(torch.arange(64)[None], labels=torch.arange(64)[None]).loss
        loss.backward()
        linears = quantized_linears(model).values()
        products[rounding] = loss.detach(), torch.stack([linear.weight.grad.norm() for linear in linears])
    (loss, gradients), (other_loss, other_gradients) = products.values()
    assert torch.equal(loss, other_loss)
    assert (gradients != other_gradients).all()
    torch.testing.assert_close(gradients, other_gradients, rtol=0.1, atol=0)
