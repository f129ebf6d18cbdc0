"""The device and its arithmetic: where tensors live, BF16 or FP32, autocast, memory allocator, random numbers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

import torch

from qat.errors import UserError


def get_device() -> torch.device:
    """Return the first GPU, under `torchrun` this rank's, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the device, without waiting for the copy."""
    if tensor.device.type == get_device().type:
        return tensor
    return tensor.pin_memory().to(get_device(), non_blocking=True)


def resolve_arithmetic(wanted: str) -> str:
    """Return the arithmetic of products, "bf16" or "fp32".

    "auto" is $HIF8_ARITHMETIC where that is set, so that different machines can train the same run. Else it is BF16
    where the hardware multiplies matrices in it, and FP32 elsewhere: emulated BF16 is several times slower, and on a
    Xeon with AVX-512's BF16 instructions but no AMX a training step took 1.8 times as long as in FP32.
    """
    if wanted == "auto":
        wanted = os.environ.get("HIF8_ARITHMETIC") or "auto"
    if wanted == "auto":
        wanted = "bf16" if has_bf16_products() else "fp32"
    return wanted


def has_bf16_products() -> bool:
    """Return whether the GPU, or without one the processor (x86 with AMX, Arm), multiplies matrices in BF16."""
    if get_device().type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "bf16"))


def autocast(arithmetic: str):
    """Return the context of forward passes: products in BF16, or everything in FP32."""
    if arithmetic == "bf16":
        # With autocast's cache, all pieces of the loss would share one BF16 copy of the head's weight, and their
        # gradients would be summed in BF16.
        return torch.autocast(get_device().type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def attention_of_any_length():
    """Return the context to score questions in: attention without cuDNN, which plans anew for every length."""
    kernels = torch.nn.attention.SDPBackend
    return torch.nn.attention.sdpa_kernel([kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH])


def prepare() -> None:
    """Set up this process to train or to score: both must compute alike. Call before the first large allocation."""
    round_sums_once()
    keep_freed_memory()


def round_sums_once() -> None:
    """Let a GPU add BF16 products in FP32 and round the complete sum, not its parts."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the kernel.

    Otherwise page faults on fresh memory take a third of a CPU training step. Blocks as large as an embedding or all
    logits are still returned: reused, they fragment the heap, and peak memory is 5 % higher.
    """
    if get_device().type != "cpu" or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 96 * 2**20) or mallopt(mmap_threshold, 32 * 2**20)  # older glibc takes no more
        mallopt(trim_threshold, 2**31 - 1)


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of the random number generators of the CPU and of this process's GPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(get_device())} if get_device().type == "cuda" else state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state of `rng_state`; a missing generator stays as it is. Errors: UserError for another size."""
    try:
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state and get_device().type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], get_device())
    except (RuntimeError, TypeError) as error:
        raise UserError("rng.safetensors holds no state of a random number generator of this PyTorch") from error
