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
    """Return "bf16" or "fp32", what products are computed in. "auto" is what $HIF8_ARITHMETIC says, so that unlike
    machines train the same runs; else BF16 where the processor has instructions for it: emulated, it is several times
    slower than FP32."""
    wanted = os.environ.get("HIF8_ARITHMETIC") or "auto" if wanted == "auto" else wanted
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16() else "fp32"


def has_bf16() -> bool:
    """Return whether the GPU, or without one the processor, has instructions for BF16."""
    if get_device().type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(arithmetic: str):
    """Return the context in which forward passes run: products in BF16, or everything in FP32."""
    if arithmetic == "bf16":
        # With the cache, all pieces of the loss would read one BF16 copy of the head, and add their gradients in BF16.
        return torch.autocast(get_device().type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def attention_of_any_length():
    """Return the context to score questions in. It leaves out cuDNN, which plans attention for each length anew."""
    kernels = torch.nn.attention.SDPBackend
    return torch.nn.attention.sdpa_kernel([kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH])


def prepare() -> None:
    """Set up this process to train or score, which must compute alike. Call before the first large allocation."""
    round_sums_once()
    keep_freed_memory()


def round_sums_once() -> None:
    """Let a GPU round sums of BF16 products when they are complete, and not their parts."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the kernel after each tensor: page faults on fresh
    memory cost a third of a CPU training step otherwise. The few as large as an embedding or all logits are returned:
    kept, they cut the heap into pieces, and the peak is a twentieth higher."""
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
    """Put back what `rng_state` gave; what is missing stays as it was seeded. Errors: UserError for another size."""
    try:
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state and get_device().type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], get_device())
    except (RuntimeError, TypeError) as error:
        raise UserError("rng.safetensors holds no state of a random number generator of this PyTorch") from error
