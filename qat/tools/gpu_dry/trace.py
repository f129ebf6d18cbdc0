"""Compile one training step for a GPU that is not there: Dynamo, AOTAutograd, Inductor, Triton and ptxas.

The step runs on tensors without data, as far as code of the host goes: kernels only return, so that what the generated
code allocates is known, and whatever would read a tensor on the host stops it. Run as a process of its own, with
`pretend.cpp` preloaded: `python -m qat.tools.gpu_dry.trace <overrides>` prints a `Trace` as JSON.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from qat.cli import entry
from qat.config import Config, register
from qat.models.load import load_config
from qat.tools.gpu_dry.pretend import pretend
from qat.tools.plan import memory
from qat.utils import distributed, environment


@dataclass
class Trace:
    """What became of a step.

    graphs: of its forward pass. kernels: different ones that Inductor wrote; launches: of these in a step. registers:
    the most of a thread; spilled: kernels that keep some in memory. peak: bytes.
    """

    graphs: int
    kernels: int
    launches: int
    registers: int
    spilled: int
    peak: int


class _Kernel:
    """Stands in for a Triton kernel in the code that Inductor writes."""

    sources: ClassVar[collections.Counter] = collections.Counter()  # source -> launches

    def __init__(self, source: str):
        self.source = source
        self.sources[source] += 0

    def run(self, *_, **__) -> None:
        self.sources[self.source] += 1


def _attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Do `scaled_dot_product_attention` by the kernel that a GPU would choose; the choice would ask the driver."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.dtype is torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[0]


def _without_kernels() -> None:
    """Let generated code run on tensors without data."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.kernel import mm  # noqa: F401  registers what is replaced next
    from torch._inductor.select_algorithm import extern_kernels

    extern_kernels._scaled_mm = lambda *_, out, **__: out  # it has no implementation without data
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": _Kernel(source)
    made = torch._C._dynamo.guards
    made._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda")
    made._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(size, stride, x.storage_offset() + offset)
    # Or compiled code would not run within it.
    memory.Allocations.is_infra_mode = classmethod(lambda _: True)
    memory.Allocations.supports_higher_order_operators = True
    F.scaled_dot_product_attention = _attend


def trace(cfg: Config) -> Trace:
    """Compile the step of `cfg` and run it once more. Errors: whatever stops the compilers."""
    _without_kernels()
    counters = torch._dynamo.utils.counters
    with memory.without_data(), torch.device("cuda"), like_ranks(cfg):
        trainer = memory.trainer(load_config(cfg.model), cfg)
        memory.peak_of_step(trainer, cfg.batch[1])  # compiles
        _Kernel.sources = collections.Counter(dict.fromkeys(_Kernel.sources, 0))
        trainer.optimizer.zero_grad()
        gradients, rest = memory.peak_of_step(trainer, cfg.batch[1])
    static = 12 * sum(p.numel() for p in trainer.model.parameters())
    resources = [usage for source in _Kernel.sources for usage in compiled(source)]
    return Trace(
        graphs=counters["stats"]["unique_graphs"],
        kernels=len(_Kernel.sources),
        launches=_Kernel.sources.total(),
        registers=max(registers for registers, _ in resources),
        spilled=sum(stack > 0 for _, stack in resources),
        peak=static + gradients + rest,
    )


@contextlib.contextmanager
def like_ranks(cfg: Config) -> Iterator[None]:
    """With FSDP, compile blocks apart and round weights in them, as on several ranks; nothing is sharded."""
    fsdp = cfg.budget.parallel == "fsdp"
    ranks = mock.patch.object(environment, "world_size", lambda: 1 + fsdp)
    with ranks, mock.patch.object(distributed, "is_sharded", lambda _: fsdp):
        yield


def compiled(source: str) -> list[tuple[int, int]]:
    """Compile a kernel that Inductor wrote; return (registers a thread, bytes of stack) of each of its settings."""
    from torch._inductor.codecache import PyCodeCache

    name = re.search(r"^def (\w+)\(", source, re.MULTILINE)[1]
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    return [_usage(result.kernel.asm["cubin"]) for result in kernel.compile_results]


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def configured(words: list[str]) -> Config:
    """Return the configuration of command-line words."""
    register()
    with initialize_config_dir(entry.CONF, version_base="1.3"):
        return entry.typed_config(compose("train", words))


def main(words: list[str]) -> None:
    cfg = configured(words)
    pretend()
    print(json.dumps(dataclasses.asdict(trace(cfg))))


if __name__ == "__main__":
    main(sys.argv[1:])
