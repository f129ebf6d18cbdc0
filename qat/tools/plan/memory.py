"""Trace a training step on tensors without data, to say how much memory it takes on each rank."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qat.config import Config
from qat.quant.convert import convert
from qat.quant.kernels import dispatch
from qat.quant.linear import QuantizedLinear
from qat.tools.flops import Shape
from qat.train import step
from qat.utils import device

# The sum is right within this share: against peaks measured on CPUs (tests/tools/test_plan.py). Not measured on GPUs.
ERROR = 0.1


def training(architecture: PreTrainedConfig, shape: Shape, cfg: Config, ranks: int, on_gpus: bool) -> dict[str, float]:
    """Return the bytes on each rank, by use, where a training step takes most. Steps are eager."""
    sharded = ranks if ranks > 1 and cfg.budget.parallel == "fsdp" else 1
    shadow = cfg.quantized and bool(cfg.scaling.shadow)
    gradients, rest = _peak(architecture, cfg, cfg.batch[1] // ranks, on_gpus)
    weight, kind = cfg.optim.weight_bytes, "BF16" if cfg.optim.pure_bf16 else "FP32"
    weights, moments = weight * shape.parameters, {"fp32": kind, "bf16": "BF16", "hif8": "HiF8/FP16"}[cfg.optim.moments]
    parts = {
        f"parameters, {kind}": weights / sharded,
        f"gradients, {kind}": (weights if ranks > 1 else gradients) / sharded,
        f"Adam moments, {moments}": cfg.optim.moment_bytes * shape.parameters / sharded,
        "activations and logits": rest,
        "gradients unquantized": weights * shadow,  # with which those of scaling.shadow are compared
        f"teacher, {kind}": weights / sharded if cfg.loss.distill else 0,
    }
    if sharded > 1:  # two blocks and the parameters outside of blocks are whole, with their gradients
        parts["gathered for use"] = 2 * weight * (2 * shape.block + shape.parameters - shape.blocks * shape.block)
    elif ranks > 1:
        parts["gradient buckets"] = weights
    return {name: value for name, value in parts.items() if value}


def _peak(architecture: PreTrainedConfig, cfg: Config, calls: int, on_gpus: bool) -> tuple[int, int]:
    """Return the bytes of (gradients, what else the step allocates) at the peak of the last step of a run."""
    cfg = copy.deepcopy(cfg)
    cfg.budget.compile = False
    with on_cpu(on_gpus), without_data():
        return peak_of_step(trainer(architecture, cfg), calls)


def trainer(architecture: PreTrainedConfig, cfg: Config) -> step.Trainer:
    """Return a trainer whose next step is like those in the middle of a run."""

    def load(*_):
        return AutoModelForCausalLM.from_config(architecture).train(), None

    model = load()[0]
    bank, _ = convert(model, cfg)
    with mock.patch.object(step, "load_model", load):  # for a teacher
        trainer = step.Trainer(model, bank, cfg)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    trainer.optimizer.found_inf = torch.zeros((), device=parameter.device)
    trainer.optimizer.step()  # makes the moments
    trainer.optimizer.zero_grad()
    if bank is not None:
        bank.unseen = frozenset()
    return trainer


def peak_of_step(trainer: step.Trainer, calls: int) -> tuple[int, int]:
    """Return the bytes of (gradients, what else a step allocates) at the peak of the last step of the run.

    calls: micro-batches. More than two are not traced: gradients are complete after the first.
    """
    parameters, cfg = list(trainer.model.parameters()), trainer.cfg
    shape = cfg.batch[0], cfg.budget.seq_len + 1
    batches = [torch.empty(shape, dtype=torch.int64, device=parameters[0].device)] * min(calls, 2)
    with Allocations(lambda: sum(p.grad.nbytes for p in parameters if p.grad is not None)) as allocations:
        trainer.step(cfg.steps, batches)
    return allocations.gradients, allocations.peak - allocations.gradients


class Allocations(TorchDispatchMode):
    """Add up the storages of new tensors that are alive.

    peak: the most bytes at a time; gradients: what `count_gradients` returned then.
    """

    def __init__(self, count_gradients: Callable[[], int]):
        super().__init__()
        self.peak = self.gradients = self._now = 0
        self._count_gradients, self._alive = count_gradients, {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        if self._now > self.peak:
            self.peak, self.gradients = self._now, self._count_gradients()
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._alive.pop(key)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Make tensors without data; the fused kernels return such tensors."""

    def quantize(x, scale, slot, clip, overflow_value, output):
        values = x.new_empty(0) if output == "e4m3" else torch.empty_like(x)
        return values, x.new_empty(0 if output == "values" else x.shape, dtype=torch.uint8)

    kernels = SimpleNamespace(quantize=quantize, decode=lambda codes, dtype: codes.new_empty(codes.shape, dtype=dtype))
    fused_for = dispatch._fused
    fused = mock.patch.object(dispatch, "_fused", lambda *wanted: kernels if fused_for(*wanted) else None)
    with mock.patch.dict(os.environ, WORLD_SIZE="1"), fused, FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextlib.contextmanager
def on_cpu(like_gpus: bool) -> Iterator[None]:
    """Use the CPU, also where there is a GPU; like_gpus: hold rounded weights as a GPU does."""

    def round_weight(linear, dtype):
        return linear.quantizers["weight"](linear.weight.to(dtype), "values").packed()

    mm = mock.patch.object(dispatch, "mm", lambda a, b, factor: dispatch.unscale(a @ b, factor))
    weights = mock.patch.object(QuantizedLinear, "_round_weight", round_weight)
    cpu = mock.patch.object(device, "get_device", lambda: torch.device("cpu"))
    with cpu, mm, weights if like_gpus else contextlib.nullcontext():
        yield
