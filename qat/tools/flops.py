"""Count a model's sizes and the FLOPs of a training token; measure the rate of large products."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qat.config import Config
from qat.models.load import transformer_blocks
from qat.quant.convert import Coverage, convert
from qat.utils.device import get_device


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    parameters: int
    linears: int  # parameters of all linears, the head too
    blocks: int
    block: int  # parameters of one block
    attended: int  # query heads x head size
    vocabulary: int
    tensors: int  # of parameters
    buffers: int  # elements
    scales: int  # quantized tensors

    def flops(self, length: int) -> float:
        """Return the FLOPs of training on a token: 6 a weight of linears, and causal attention over `length` tokens."""
        return 6.0 * self.linears + 6.0 * self.blocks * self.attended * length


def model_shape(config: PreTrainedConfig, cfg: Config) -> tuple[Shape, Coverage]:
    """Return a model's sizes and what `cfg` quantizes, from a model on the meta device. Errors: ConfigError."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    bank, coverage = convert(model, cfg)
    heads = config.num_attention_heads
    shape = Shape(
        parameters=coverage.all_parameters,
        linears=coverage.matmul_parameters,
        blocks=config.num_hidden_layers,
        block=max(sum(p.numel() for p in block.parameters()) for block in transformer_blocks(model)),
        attended=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=config.vocab_size,
        tensors=sum(1 for _ in model.parameters()),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
        scales=len(bank.names) if bank is not None else 0,
    )
    return shape, coverage


def product_flops(size: int, arithmetic: str) -> float:
    """Return the FLOP/s of a product of two square matrices here, the best of five. arithmetic: bf16 or fp32."""
    a = torch.randn(size, size, dtype=torch.bfloat16 if arithmetic == "bf16" else torch.float32, device=get_device())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
