"""Next-token cross-entropy in nats. Where there are many logits, they are computed in pieces to save memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class TokenLosses(nn.Module):
    """`token_losses` of one model as a module, which can be compiled and wrapped by DDP or FSDP."""

    def __init__(self, model: nn.Module, label_shift: str, largest_logits: int):
        super().__init__()
        self.model, self.label_shift, self.largest_logits = model, label_shift, largest_logits

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        label_shift = self.label_shift if self.training else "once"  # always evaluate next-token prediction
        return token_losses(self.model, tokens, label_shift, self.largest_logits)


def token_losses(
    model: nn.Module, tokens: torch.Tensor, label_shift: str = "once", largest_logits: int = 2**28
) -> torch.Tensor:
    """Return the cross-entropy of every predicted token of a Hugging Face causal LM, FP32 [sequences, length].

    tokens: int64 [sequences, length + 1]. "once": position i predicts token i+1. "twice" repeats the released code's
    mistake (experiments/README.md): position i is trained to predict token i+2, so one column is lost.
    largest_logits: more logits than this are computed in pieces, in the forward pass and again in the backward pass. A
    piece has a multiple of 128 rows where possible, which keeps the products aligned.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if label_shift == "twice":
        labels = labels[:, 1:]
    head = model.get_output_embeddings()
    rows = max(1, largest_logits // head.out_features)
    if rows >= labels.numel() or not has_plain_head(model):
        logits = model(input_ids=inputs, use_cache=False).logits[:, : labels.shape[1]]
        return _cross_entropy(logits.flatten(0, 1), labels.flatten()).view(labels.shape)
    hidden = model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state[:, : labels.shape[1]]
    rows -= rows % 128 if rows > 128 else 0
    pieces = zip(hidden.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True)
    losses = [checkpoint(_head_losses, head, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(losses).view(labels.shape)


def has_plain_head(model: nn.Module) -> bool:
    """Return whether the logits are only the output embedding applied to the last hidden state."""
    return model.config.model_type in ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


def _head_losses(head: nn.Module, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _cross_entropy(head(rows), labels)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")
