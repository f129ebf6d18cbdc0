"""Run what Inductor writes for a GPU that is not there in Triton's interpreter, beside the same step run eagerly.

A small model makes the same step on the CPU eagerly and compiled. Graphs are traced there; when Inductor gets them,
their tensors are taken for those of the GPU. Run as a process of its own, with `pretend.cpp` preloaded and
TRITON_INTERPRET=1: `python -m qat.tools.gpu_dry.interpret <overrides>` prints the difference.
"""

from __future__ import annotations

import copy
import functools
import sys

import torch

from qat.config import Config
from qat.models.load import load_model
from qat.quant.convert import convert
from qat.quant.kernels import dispatch, lookup
from qat.tools.bench.steps import tokens
from qat.tools.gpu_dry.pretend import pretend
from qat.tools.gpu_dry.trace import configured, like_ranks
from qat.tools.plan import memory
from qat.train.step import Trainer

_GPU = torch.device("cuda", 0)


def difference(cfg: Config) -> float:
    """Return by how much a compiled step differs from the eager one, relatively: in loss, gradients or amaxes, the most
    of these."""
    torch.compile = functools.partial(torch.compile, backend=_backend)
    dispatch.table = _table
    with memory.on_cpu(like_gpus=True), like_ranks(cfg):
        plain, compiled = _trainer(cfg, compile=False), _trainer(cfg, compile=True)
        expected = _second_step(plain)
        pretend()
        _interpreted()
        pairs = zip(_second_step(compiled), expected, strict=True)
        return max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)


def _table(device: torch.device, format: str, overflow: str, target: float) -> torch.Tensor | None:
    """Do as `qat.quant.kernels.dispatch.table` does on a GPU."""
    return lookup.table(device, *dispatch._edges(overflow, target)) if format == "hif8" else None


def _trainer(cfg: Config, compile: bool) -> Trainer:
    cfg = copy.deepcopy(cfg)
    cfg.budget.compile = compile
    model, _ = load_model(cfg.model, cfg.seed)
    return Trainer(model, convert(model, cfg)[0], cfg)


def _second_step(trainer: Trainer) -> list[torch.Tensor]:
    """Make two steps, the first of which is eager where it quantizes. Return loss, gradients and amaxes."""
    batch = tokens(trainer.cfg, trainer.model.config.vocab_size)
    for number in (1, 2):
        result = trainer.step(number, [batch])
    gradients = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    return [result.loss, gradients, *([] if result.amax is None else [result.amax])]


def _backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, inner_compile=_for_gpu)


def _for_gpu(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options):
    """Do as Inductor's `compile_fx_inner`, as if all tensors were on the GPU."""
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import compile_fx_inner

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", _GPU)
    with detect_fake_mode(inputs):
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_GPU) for x in inputs]
    return compile_fx_inner(graph, inputs, **options)


def _interpreted() -> None:
    """Let generated code run on the CPU, with what Triton's interpreter lacks."""
    import triton.language as tl
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.interpreter import InterpreterBuilder

    made, atomic = torch._C._dynamo.guards, InterpreterBuilder.create_atomic_rmw
    made._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    tl.math.isnan, tl.math.isinf = lambda x: x != x, lambda x: tl.abs(x) == float("inf")
    triton_helpers.libdevice = tl.math  # NVIDIA's library has no code for a CPU
    triton_helpers.max2 = lambda x, axis: tl.max(x, axis)  # its own goes element by element

    def atomic_by_whole_mask(self, operation, pointers, values, mask, *how):
        mask.data = mask.data.copy()  # one that is broadcast would be read beyond its end
        return atomic(self, operation, pointers, values, mask, *how)

    InterpreterBuilder.create_atomic_rmw = atomic_by_whole_mask


if __name__ == "__main__":
    print(difference(configured(sys.argv[1:])))
