"""Estimate the memory that training takes on each rank, from the model's sizes."""

from __future__ import annotations

from qat.config import Config
from qat.quant.convert import Coverage
from qat.quant.rules import RULES
from qat.tools.flops import Shape

# The estimate is right within this factor: its sum against the peaks in a benchmark's record, and its activations
# against what autograd held (tests/tools/test_plan.py). On GPUs and for compiled steps nothing is measured yet.
ERROR = 1.25


def training(shape: Shape, coverage: Coverage, cfg: Config, ranks: int, on_gpus: bool) -> dict[str, float]:
    """Return the bytes on each rank, by use, at the beginning of a backward pass, where their sum is largest."""
    size = 2 if cfg.budget.arithmetic == "bf16" else 4
    sharded = ranks if ranks > 1 and cfg.budget.parallel == "fsdp" else 1
    tokens = cfg.batch[0] * cfg.budget.seq_len
    shadow = cfg.quantized and bool(cfg.scaling.shadow)
    codes = cfg.quant.weights and not on_gpus and not shadow  # a CPU has codes where amaxes are recorded
    models = 2 if cfg.loss.distill else 1  # whose logits are made together
    logits = min(models * tokens * shape.vocabulary, cfg.budget.largest_logits)
    parts = {
        "parameters, FP32": 4 * shape.parameters / sharded,
        "gradients, FP32": 4 * shape.parameters / sharded,
        f"Adam moments, {_MOMENTS[cfg.optim.moments]}": cfg.optim.moment_bytes * shape.parameters / sharded,
        "rounded weights": (1 if codes else size) * coverage.parameters,
        "other linears in BF16": 2 * (shape.linears - coverage.parameters) if size == 2 else 0,
        "activations": activations(shape, coverage, size, cfg.budget.activation_checkpointing, _learns(cfg)) * tokens,
        "logits": 12 * logits,
        "gradients unquantized": 4 * shadow * shape.parameters,  # with which those of scaling.shadow are compared
    }
    if cfg.loss.distill:  # its activations are gone before logits are made, except for the last
        parts["teacher, FP32"] = 4 * shape.parameters / sharded
        parts["teacher's last states"] = 4 * shape.hidden * tokens
    if sharded > 1:  # two blocks and the parameters outside of blocks are whole, with their gradients
        rest = shape.parameters - shape.blocks * shape.block
        parts["gathered for use"] = 8 * (2 * shape.block + rest)
    elif ranks > 1:
        parts["gradient buckets"] = 4 * shape.parameters
    return {name: value for name, value in parts.items() if value}


def _learns(cfg: Config) -> bool:
    return cfg.quantized and RULES[cfg.scaling.algo].learns


def activations(
    shape: Shape, coverage: Coverage, size: int, checkpointing: bool = False, learns: bool = False
) -> float:
    """Return the bytes that all blocks keep for the backward pass, for each token.

    size: bytes of an element of a product, 2 or 4. checkpointing: only one block and the inputs of all are kept.
    learns: scales are learned, for which inputs are kept beside their codes.

    A block keeps: of both norms, their input and its normed value in FP32. Of a linear, its input: under autocast a
    BF16 copy for each linear; in FP32 linears with the same input share it; quantized, one byte, shared. Of attention,
    queries, keys and values (repeated for every query head), its output, and that again in the order that `o_proj`
    reads. Of the MLP, gate, up, the activated gate and their product.
    """
    h, q, f = shape.hidden, shape.attended, shape.inner
    kinds = coverage.kinds()
    share = {  # of the blocks that keep this input as codes
        which: max((kinds[name][0] for name in names if name in kinds), default=0) / shape.blocks
        for which, names in _READERS.items()
    }

    def input_bytes(which: str, features: int, copies: int) -> float:
        plain = size * (copies if size == 2 else 1)
        return features * (share[which] * (1 + learns * plain) + (1 - share[which]) * plain)

    block = 16 * h + 4 * size * q + 3 * size * f
    block += input_bytes("attention", h, 3) + input_bytes("output", q, 1)
    block += input_bytes("mlp", h, 2) + input_bytes("product", f, 1)
    blocks = block + shape.blocks * 4 * h if checkpointing else shape.blocks * block
    return blocks + 8 * h  # and the norm after the last block


_MOMENTS = {"fp32": "FP32", "bf16": "BF16", "hif8": "HiF8/FP16"}

_READERS = {  # input -> linears that may read it
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "output": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
    "product": ("mlp.down_proj",),
}
