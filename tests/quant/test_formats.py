"""The formats' common interface."""

import math

import pytest
import torch

from qat.quant import hif8
from qat.quant.formats import FORMATS, to_e4m3
from qat.quant.kernels import dispatch
from tests.helpers.hif8_inputs import ALL_BF16


def nearest_even(x: float, fraction_bits: int, smallest_exponent: int) -> float:
    """Round one number to a binary floating-point grid, ties to even, without an upper bound."""
    if x == 0 or not math.isfinite(x):
        return x
    exponent = max(math.frexp(abs(x))[1] - 1, smallest_exponent)
    unit = 2.0 ** (exponent - fraction_bits)
    return round(x / unit) * unit  # Python rounds halves to even


@pytest.mark.parametrize(("name", "bits", "smallest"), [("fp8_e4m3", 3, -6), ("fp8_e5m2", 2, -14)])
def test_fp8_rounding(name, bits, smallest):
    x = ALL_BF16[ALL_BF16.isfinite()].float()
    largest = FORMATS[name].largest
    expected = torch.tensor([nearest_even(v, bits, smallest) for v in x.tolist()])
    saturated = FORMATS[name].round(x, "saturate")
    assert torch.equal(saturated, expected.clamp(-largest, largest))
    overflowing = FORMATS[name].round(x, "inf")
    inside = expected.abs() <= largest
    assert torch.equal(overflowing[inside], expected[inside])
    past = overflowing[~inside]
    assert past.isnan().all() if name == "fp8_e4m3" else past.isinf().all()


@pytest.mark.parametrize("name", FORMATS)
def test_mantissa_bits_bound_the_error(name):
    chosen = FORMATS[name]
    x = torch.exp2(torch.linspace(-9, math.log2(chosen.largest) - 0.1, 20_000))
    error = (chosen.round(x, "saturate") - x).abs() / x
    bits = chosen.mantissa_bits(x)
    for tier in bits.unique():
        # With m stored bits the spacing is 2^-m of the power of two below, so the error is at most half of that.
        worst = error[bits == tier].max().item()
        assert worst <= 2.0 ** -(tier + 1)
        assert worst > 2.0 ** -(tier + 3)


@pytest.mark.parametrize("name", FORMATS)
def test_clip_stops_at_the_target(name):
    x = torch.tensor([14.9, 15.0, 15.4, 16.0, 1e6, float("inf"), -1e6])
    clipped = FORMATS[name].quantize(x, "clip", 15.0)
    top = FORMATS[name].round(torch.tensor(15.0), "saturate").item()
    assert clipped.abs().max().item() == top
    assert clipped[-1].item() == -top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_amax_is_the_largest_so_far_and_a_nan_stays(format, dtype):
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(2)).to(dtype)
    small, large, one = torch.tensor([0.5]), torch.tensor([100.0]), torch.tensor(1.0)
    for slot in (small, large):
        dispatch.quantize(x, one, slot, format, "clip", 15.0, "values")
    assert small == dispatch.amax(x) == x.abs().max().float() and large == 100.0
    x[17] = float("nan")
    for tensor in (x, torch.ones(5).to(dtype)):
        dispatch.quantize(tensor, one, small, format, "clip", 15.0, "values")
        assert small.isnan() and dispatch.amax(x).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_codes_bring_back_the_values(format, dtype):
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(3)).to(dtype)
    values, codes = dispatch.quantize(x, torch.tensor(2.0), None, format, "saturate", 0.0, "codes")
    assert torch.equal(dispatch.decode(codes, format, dtype), values)
    assert dispatch.decode(codes, format, dtype).dtype == values.dtype == dtype


def test_hif8_values_are_e4m3_values_from_two_to_the_minus_12():
    """Times 16, every one up to 28; below, the error is at most half of E4M3's spacing there, 2^-14."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = hif8.decode(codes)
    values = values[values.isfinite() & (values.abs() <= 28)]
    carried = to_e4m3(values).view(torch.float8_e4m3fn).float() / 16
    exact = values.abs() >= 2.0**-12
    assert exact.sum() == 2 * 86 and torch.equal(carried[exact], values[exact])
    assert 0 < (carried - values)[~exact].abs().max() <= 2.0**-14
    for dtype in (torch.float32, torch.bfloat16):
        nothing, bytes_ = dispatch.quantize(values.to(dtype), torch.tensor(1.0), None, "hif8", "clip", 15.0, "e4m3")
        assert nothing.numel() == 0 and torch.equal(bytes_, to_e4m3(values.clamp(-15, 15)))


def test_unscaling_multiplies_in_fp32():
    factor = torch.tensor(0.123456789)
    expected = (ALL_BF16.float() * factor).bfloat16()
    assert not torch.equal(expected.nan_to_num(), (ALL_BF16 * factor.bfloat16()).nan_to_num())
    torch.testing.assert_close(dispatch.unscale(ALL_BF16.clone(), factor), expected, rtol=0, atol=0, equal_nan=True)
