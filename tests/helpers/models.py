"""Random models in folders, as a hub has them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qat.models.tokenizer import byte_tokenizer


def write_model(folder: Path, kind: str = "llama", seed: int = 0, dtype: str = "float32", **sizes) -> None:
    """Write a model of a family with the tokenizer of bytes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **sizes)
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
