"""HiF8 against an independent implementation (the NumPy dtype of en-dtypes), bit for bit."""

import numpy as np
import pytest
import torch

from qat import hif8  # the public name
from tests.helpers.hif8_inputs import CODES, inputs, magnitudes


@pytest.fixture
def hifloat8():
    return pytest.importorskip("en_dtypes", reason="it has no wheels beyond CPython 3.12").hifloat8


def oracle(x: torch.Tensor, hifloat8) -> np.ndarray:
    """Codes that en-dtypes gives for FP32 values."""
    with np.errstate(invalid="ignore", over="ignore"):
        return x.float().numpy().astype(hifloat8).view(np.uint8)


def test_decode_all_codes(hifloat8):
    expected = CODES.numpy().view(hifloat8).astype(np.float32)
    np.testing.assert_array_equal(hif8.decode(CODES).numpy(), expected)


def test_format_landmarks():
    landmarks = {0x00: 0.0, 0x08: 1.0, 0x10: 2.0, 0x18: 0.5, 0x6E: 2.0**15, 0x6D: 24576.0, 0x01: 2.0**-22}
    for code, value in landmarks.items():
        assert hif8.decode(torch.tensor([code], dtype=torch.uint8)).item() == value
    assert len(magnitudes()) == 127
    assert torch.equal(magnitudes(), magnitudes().bfloat16().float())


@pytest.mark.parametrize("x", inputs().values(), ids=inputs())
def test_encode_and_fake_quantize(hifloat8, x):
    codes = oracle(x, hifloat8)
    np.testing.assert_array_equal(hif8.encode(x).numpy(), codes)
    values = codes.view(hifloat8).astype(np.float32)
    rounded = hif8.fake_quantize(x)
    assert rounded.dtype == x.dtype
    np.testing.assert_array_equal(rounded.float().numpy(), values)


def test_round_trip():
    codes = CODES[CODES != hif8.NAN]
    assert torch.equal(hif8.encode(hif8.decode(codes)), codes)


def test_special_values():
    x = torch.tensor([float("nan"), -0.0, -1e-30, float("inf"), float("-inf"), 15.5, -15.5])
    assert hif8.encode(x).tolist() == [0x80, 0x00, 0x00, 0x6F, 0xEF, *hif8.encode(torch.tensor([16.0, -16.0])).tolist()]
    zeros = hif8.fake_quantize(x[1:3])
    assert not torch.signbit(zeros).any() and not zeros.any()


@pytest.mark.parametrize(
    ("overflow", "expected"),
    [
        ("inf", [32768.0, float("inf"), float("-inf"), float("inf")]),
        ("saturate", [32768.0, 32768.0, -32768.0, 32768.0]),
    ],
)
def test_overflow(overflow, expected):
    x = torch.tensor([np.nextafter(np.float32(40960), np.float32(0)), 40960.0, -1e9, float("inf")])
    assert hif8.fake_quantize(x, overflow).tolist() == expected
    assert hif8.decode(hif8.encode(x, overflow)).tolist() == expected


def test_wrong_arguments():
    with pytest.raises(ValueError, match="choose one of"):
        hif8.fake_quantize(torch.ones(1), "wrap")
    with pytest.raises(TypeError, match="uint8"):
        hif8.decode(torch.ones(1))
