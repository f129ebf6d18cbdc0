"""Count a model's sizes and the FLOPs of a training token; the peak rates of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qat.config import Config
from qat.models.load import transformer_blocks
from qat.quant.convert import Coverage, convert

# Dense BF16 products with FP32 accumulation, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "A100": 312e12}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: parameters, and features of the tensors that are kept for the backward pass."""

    parameters: int
    linears: int  # parameters of all linears, the head too
    blocks: int
    block: int  # parameters of one block
    hidden: int
    inner: int  # of the MLP
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
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        attended=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=config.vocab_size,
        tensors=sum(1 for _ in model.parameters()),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
        scales=len(bank.names) if bank is not None else 0,
    )
    return shape, coverage
