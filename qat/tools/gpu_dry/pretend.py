"""Let PyTorch and Triton of this process take a GPU of compute capability 9.0 for present, to compile for it.

Importing this changes nothing. `pretend` replaces private parts of PyTorch for good: call it in a process of its own,
in which tensors have no data.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

CAPABILITY = 90

# What Inductor asks of an H200: the maker's data sheet, and for the rest the limits of compute capability 9.0.
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=143771 * 2**20, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20, gcnArchName="", is_integrated=0, is_multi_gpu_board=0, clock_rate=1980000,
    memory_clock_rate=3201000, memory_bus_width=6144,
)  # fmt: skip


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, *_):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def is_active(self):
        return True


class _Generator(torch.Generator):
    """A generator on the GPU: with activation checkpointing, compiled code saves and restores its state."""

    device = torch.device("cuda", 0)

    def clone_state(self):
        return _Generator()

    def graphsafe_get_state(self):
        return self

    def graphsafe_set_state(self, state):
        pass


def pretend() -> None:
    """Make this process take the GPU for present. It cannot be undone."""
    _cuda()
    _dynamo()
    _inductor()
    _triton()


def _cuda() -> None:
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": _PROPERTIES,
        "get_device_capability": (9, 0), "get_device_name": _PROPERTIES.name, "is_bf16_supported": True,
        "is_initialized": False, "synchronize": None, "set_device": None, "_lazy_init": None, "_is_compiled": True,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, _constant(answer))
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.default_generators = (_Generator(),)
    for name in ("getCurrentRawStream", "getDevice", "exchangeDevice", "maybeExchangeDevice", "setDevice"):
        setattr(torch._C, f"_cuda_{name}", _constant(0))
    torch._C._cuda_hasPrimaryContext = _constant(True)


def _dynamo() -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor

    answers = {
        "current_device": 0, "device_count": 1, "is_available": True, "get_device_properties": _PROPERTIES,
        "get_compute_capability": CAPABILITY, "is_bf16_supported": True, "is_triton_capable": True,
        "raise_if_triton_unavailable": None, "is_dtype_supported": True, "synchronize": None,
        "maybe_exchange_device": 0, "exchange_device": 0, "set_device": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(_constant(answer)))
    for name in ("get_device_properties", "current_device", "set_device"):
        setattr(CudaInterface.Worker, name, staticmethod(_constant(answers[name])))
    fake_tensor.init_gpu_context = _constant(None)
    fake_tensor.FakeTensorMode.avoid_device_init = True
    torch.Tensor.normal_ = torch.Tensor.uniform_ = lambda tensor, *_, **__: tensor
    torch.autograd.set_multithreading_enabled(False)


def _inductor() -> None:
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    import torch.utils._triton as found
    from torch._inductor.runtime import triton_helpers

    inductor.force_disable_caches, inductor.compile_threads = True, 1
    inductor.joint_graph_constant_folding = inductor.shape_padding = False  # these would compute, or time products
    inductor.use_static_cuda_launcher = False  # it would drop the machine code, which is read for its registers
    functorch.enable_autograd_cache = False
    found.has_triton = found.has_triton_package = _constant(True)
    triton_helpers.set_driver_to_gpu = _constant(None)


def _triton() -> None:
    from triton.runtime import driver

    driver.set_active(_Driver())


def _constant(value):
    return lambda *_, **__: value
