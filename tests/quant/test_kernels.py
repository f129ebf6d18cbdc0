"""Every kernel against the readable reference, bit for bit: fused for the CPU, looked up as compiled steps do, and
Triton's, on a GPU (-m gpu) or in its interpreter (conftest.py sees to that)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from qat.quant import hif8
from qat.quant.formats import FORMATS, TOLERANCE, to_e4m3
from qat.quant.kernels import cpu, dispatch, lookup
from tests.helpers.hif8_inputs import inputs, statistics_by_hand

pytestmark = [  # NumPy, of Inf and NaN
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
OVERFLOWS = ["clip", "saturate", "inf"]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def triton_kernels():
    pytest.importorskip("triton", reason="Triton has no wheels for this machine")
    from qat.quant.kernels import gpu

    return gpu


@pytest.fixture(scope="module", params=["fused", "looked up", "triton", CUDA])
def quantize(request):
    """quantize(x, scale, slot, overflow, target, emit): (values, codes) by a kernel, on the CPU."""
    device = "cuda" if request.param == "cuda" else "cpu"

    def work(x, scale, slot, overflow, target, emit):
        edges, factor = dispatch._edges(overflow, target), torch.tensor(scale, device=device)
        if request.param == "fused":
            return dispatch.quantize(x, factor, slot, "hif8", overflow, target, emit)
        if request.param == "looked up":
            return lookup.quantize(x, factor, slot, lookup.table(x.device, *edges), emit)
        moved = None if slot is None else slot.to(device)
        made = triton_kernels().quantize(x.contiguous().to(device), factor, moved, *edges, emit)
        if slot is not None:
            slot.copy_(moved)
        return tuple(tensor.cpu() for tensor in made)

    work.name = request.param
    return work


def assert_same_bits(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """One zero, and one NaN."""
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)
    assert not ours[ours == 0].signbit().any()


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("kind", inputs())
def test_values_codes_and_amaxes_are_the_references(quantize, kind, overflow):
    x = inputs()[kind]
    if quantize.name == "looked up" and not x.numel():
        pytest.skip("a compiled step has no empty tensors")
    amax = x.abs().max().float() if x.numel() else torch.tensor(0.0)
    for scale, target in ((1.0, 15.0), (0.37, 14.3), (1000.0, 15.0)):  # 14.3 lies between two values
        slot = torch.zeros(1)
        values, codes = quantize(x, scale, slot, overflow, target, "codes")
        reference = FORMATS["hif8"].quantize(x.float() * scale, overflow, target).to(x.dtype)
        assert_same_bits(values, reference)
        assert torch.equal(codes, hif8.encode(reference))
        quantize(0.5 * x, scale, slot, overflow, target, "codes")  # the largest counts
        torch.testing.assert_close(slot[0], amax, rtol=0, atol=0, equal_nan=True)
    values, codes = quantize(x, scale, None, overflow, target, "values")
    assert_same_bits(values, reference)
    assert codes.numel() == 0
    small = x.nan_to_num(0).clamp(-28, 28)  # what 16 times an E4M3 value can hold
    values, carried = quantize(small, 1.0, None, overflow, 15.0, "e4m3")
    expected = to_e4m3(FORMATS["hif8"].quantize(small.float(), overflow, 15.0))
    assert values.numel() == 0
    assert torch.equal(*(each.view(torch.float8_e4m3fn).float() for each in (carried, expected)))


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("device", ["fused", "triton", CUDA])
def test_statistics_are_the_references(device, overflow):
    x, scale = inputs()["random FP32"].clamp(-1e6, 1e6), torch.tensor(0.01)
    x[:7] = 0
    kernels = cpu if device == "fused" else triton_kernels()
    place = "cuda" if device == "cuda" else "cpu"
    edges = dispatch._edges(overflow, 15.0)
    counted = kernels.statistics(x.to(place), scale.to(place), *edges, 15.0 * TOLERANCE).cpu()
    reference = statistics_by_hand(x, scale, overflow)
    assert counted[:8].tolist() == reference[:8].tolist()
    assert counted[0] == (x != 0).sum() == counted[1:5].sum() + counted[6]
    assert 0 < counted[7] < counted[0]
    torch.testing.assert_close(counted[8:], reference[8:], rtol=1e-9 if device == "fused" else 1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_triton_decodes_all_codes(device, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    values = triton_kernels().decode(codes.to(device), dtype).cpu()
    torch.testing.assert_close(values, hif8.decode(codes).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
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
