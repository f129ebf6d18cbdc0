"""The Triton kernels against the readable reference, bit for bit: on a GPU (-m gpu), else in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from qat import hif8
from qat.formats import FORMATS, TOLERANCE, to_e4m3
from tests.test_formats import inputs, statistics_by_hand

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of Inf and NaN
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EDGES = {"clip": (15.0, 2.0**15), "saturate": (float("inf"), 2.0**15), "inf": (float("inf"), float("inf"))}


@pytest.fixture(scope="module", params=DEVICES)
def gpu(request):
    """(kernels, device); on CPU tensors Triton interprets them (conftest.py sees to that)."""
    pytest.importorskip("triton", reason="Triton has no wheels for this machine")
    from qat.kernels import gpu

    return gpu, request.param


def noted(values: float = 0.0) -> torch.Tensor:
    return torch.full((3,), values)


@pytest.mark.parametrize("overflow", EDGES)
@pytest.mark.parametrize("kind", inputs())
def test_rounding_and_codes(gpu, kind, overflow):
    kernels, device = gpu
    x = inputs()[kind].contiguous()
    for scale in (1.0, 0.37):
        observed = noted().to(device)
        values, codes = kernels.quantize(
            x.to(device), torch.tensor(scale, device=device), observed, 1, *EDGES[overflow], "codes"
        )
        reference = FORMATS["hif8"].quantize(x.float() * scale, overflow, 15.0).to(x.dtype)
        assert values.dtype == x.dtype and values.shape == codes.shape == x.shape
        torch.testing.assert_close(values.cpu(), reference, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes.cpu(), hif8.encode(reference))
        amax = x.abs().max().item() if x.numel() else 0.0
        assert observed[1].item() == amax or (math.isnan(amax) and observed[1].isnan())
        assert not observed[0] and not observed[2]


def test_amax_is_the_largest_so_far(gpu):
    kernels, device = gpu
    observed = noted(2.0).to(device)
    one = torch.tensor(1.0, device=device)
    for x, expected in ((torch.tensor([1.0, -1.5]), 2.0), (torch.tensor([1.0, -7.0]), 7.0)):
        kernels.quantize(x.to(device), one, observed, 2, *EDGES["clip"], "values")
        assert observed.tolist() == [2.0, 2.0, expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(gpu, dtype):
    kernels, device = gpu
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    values = kernels.decode(codes.to(device), dtype).cpu()
    torch.testing.assert_close(values, hif8.decode(codes).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_e4m3_bytes(gpu):
    kernels, device = gpu
    x = inputs()["all BF16"]
    x = x[x.isfinite()]
    values, codes = kernels.quantize(x.to(device), torch.tensor(1.0, device=device), None, 0, *EDGES["clip"], "e4m3")
    assert values.numel() == 0
    reference = to_e4m3(FORMATS["hif8"].quantize(x.float(), "clip", 15.0))
    assert torch.equal(*(each.cpu().view(torch.float8_e4m3fn).float() for each in (codes, reference)))


@pytest.mark.parametrize("overflow", EDGES)
def test_statistics(gpu, overflow):
    kernels, device = gpu
    x, scale = inputs()["random FP32"].clamp(-1e6, 1e6), torch.tensor(0.01)
    counted = kernels.statistics(x.to(device), scale.to(device), *EDGES[overflow], 15.0 * TOLERANCE).cpu()
    reference = statistics_by_hand(x, scale, overflow)
    assert counted[:8].tolist() == reference[:8].tolist()
    torch.testing.assert_close(counted[8:], reference[8:], rtol=1e-4, atol=0)
