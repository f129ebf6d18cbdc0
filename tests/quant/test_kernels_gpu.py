"""The Triton kernels against the readable reference, bit for bit: on a GPU (-m gpu), else in Triton's interpreter."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from qat.quant import hif8
from qat.quant.formats import FORMATS, TOLERANCE, to_e4m3
from tests.helpers.hif8_inputs import inputs, statistics_by_hand

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of Inf and NaN
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EDGES = {"clip": (15.0, 2.0**15), "saturate": (float("inf"), 2.0**15), "inf": (float("inf"), float("inf"))}


@pytest.fixture(scope="module", params=DEVICES)
def gpu(request):
    """(kernels, device); on CPU tensors Triton interprets them (conftest.py sees to that)."""
    pytest.importorskip("triton", reason="Triton has no wheels for this machine")
    from qat.quant.kernels import gpu

    return gpu, request.param


@pytest.mark.parametrize("overflow", EDGES)
@pytest.mark.parametrize("kind", inputs())
def test_rounding_and_codes(gpu, kind, overflow):
    kernels, device = gpu
    x = inputs()[kind].contiguous()
    for scale in (1.0, 0.37):
        slot = torch.zeros(1, device=device)
        values, codes = kernels.quantize(
            x.to(device), torch.tensor(scale, device=device), slot, *EDGES[overflow], "codes"
        )
        reference = FORMATS["hif8"].quantize(x.float() * scale, overflow, 15.0).to(x.dtype)
        assert values.dtype == x.dtype and values.shape == codes.shape == x.shape
        torch.testing.assert_close(values.cpu(), reference, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes.cpu(), hif8.encode(reference))
        amax = x.abs().max().item() if x.numel() else 0.0
        assert slot.item() == amax or (math.isnan(amax) and slot.isnan())


def test_amax_is_the_largest_so_far(gpu):
    kernels, device = gpu
    slot = torch.full((1,), 2.0, device=device)
    one = torch.tensor(1.0, device=device)
    for x, expected in ((torch.tensor([1.0, -1.5]), 2.0), (torch.tensor([1.0, -7.0]), 7.0)):
        kernels.quantize(x.to(device), one, slot, *EDGES["clip"], "values")
        assert slot.item() == expected


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
    values, codes = kernels.quantize(x.to(device), torch.tensor(1.0, device=device), None, *EDGES["clip"], "e4m3")
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


def test_machine_code_leaves_the_time_to_memory(tmp_path):
    """A multiprocessor of an H200 issues about 30 instructions a lane in the time in which memory moves an element and
    its code; about half of that keeps the kernels bound by memory. Rounding by arithmetic took 34, with codes 81."""
    pytest.importorskip("triton", reason="Triton has no wheels for this machine")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.gpu_code", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    assert {"codes bf16", "e4m3 bf16", "codes fp32", "decode bf16", "statistics bf16"} <= counted.keys()
    costly = {name: number for name, number in counted.items() if number > 18 and name != "statistics bf16"}
    assert not costly
