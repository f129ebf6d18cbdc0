"""Next-token cross-entropy and distillation, in nats. Many logits are computed in pieces to save memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class TokenLosses(nn.Module):
    """The losses of one model as a module, which can be compiled and wrapped by DDP or FSDP.

    teacher: the model to distill, which this freezes; None: there is none. distill: share of its KL in the objective.
    """

    def __init__(
        self,
        model: nn.Module,
        label_shift: str,
        largest_logits: int,
        teacher: nn.Module | None = None,
        distill: float = 0.0,
    ):
        super().__init__()
        self.model, self.label_shift, self.largest_logits = model, label_shift, largest_logits
        self.teacher, self.distill = teacher, distill
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> TokenLosses:
        """Begin or end training; the teacher stays as it is evaluated."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, tokens: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy as `token_losses`, or in training with a teacher the tuple of `distilled_losses`."""
        if self.training and self.teacher is not None:
            return distilled_losses(self.model, self.teacher, tokens, self.distill, self.largest_logits)
        label_shift = self.label_shift if self.training else "once"  # always evaluate next-token prediction
        return token_losses(self.model, tokens, label_shift, self.largest_logits)


def token_losses(
    model: nn.Module, tokens: torch.Tensor, label_shift: str = "once", largest_logits: int = 2**28
) -> torch.Tensor:
    """Return the cross-entropy of every predicted token of a Hugging Face causal LM, FP32 [sequences, length].

    tokens: int64 [sequences, length + 1]. "once": position i predicts token i+1. "twice" repeats the released code's
    mistake (experiments/README.md): position i is trained to predict token i+2, so one column is lost.
    largest_logits: more logits than this are computed in pieces, in the forward pass and again in the backward pass,
    unless the code is compiled. A piece has a multiple of 128 rows where possible, which keeps the products aligned.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if label_shift == "twice":
        labels = labels[:, 1:]
    return _by_token([model], inputs, labels, largest_logits, _cross_entropy).view(labels.shape)


def distilled_losses(
    model: nn.Module, teacher: nn.Module, tokens: torch.Tensor, distill: float, largest_logits: int = 2**28
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (objective, cross-entropy without gradient) of every predicted token, both FP32 [sequences, length].

    objective: distill * KL(teacher || model) + (1 - distill) * cross-entropy, the KL over the whole vocabulary and
    without a temperature (quantization-aware distillation, arXiv 2601.20088). The teacher's parameters are frozen.
    """

    def losses(labels: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        objective, cross_entropy = _divergence(logits.float(), wanted.float()), _cross_entropy(labels, logits)
        if distill < 1:
            objective = distill * objective + (1 - distill) * cross_entropy
        return torch.stack([objective, cross_entropy.detach()])

    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    both = _by_token([model, teacher], inputs, labels, largest_logits, losses)
    return tuple(row.view(labels.shape) for row in both)


def _by_token(
    models: Sequence[nn.Module], inputs: torch.Tensor, labels: torch.Tensor, largest_logits: int, losses: Callable
) -> torch.Tensor:
    """Return losses(labels [rows], logits [rows, vocabulary] of every model) -> FP32 [..., rows] of all labels."""
    heads = [model.get_output_embeddings() for model in models]
    rows, length = max(1, largest_logits // (len(models) * heads[0].out_features)), labels.shape[1]
    # Compiled code keeps logits as products give them, in BF16, and writes their gradients over them: pieces would take
    # more memory, and time (docs/performance.md).
    if rows >= labels.numel() or torch.compiler.is_compiling() or not has_plain_head(models[0]):
        logits = [model(input_ids=inputs, use_cache=False).logits[:, :length].flatten(0, 1) for model in models]
        return losses(labels.flatten(), *logits)

    def piece(labels: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
        return losses(labels, *(head(states) for head, states in zip(heads, hidden, strict=True)))

    hidden = [model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state[:, :length] for model in models]
    rows -= rows % 128 if rows > 128 else 0
    pieces = zip(labels.flatten().split(rows), *(states.flatten(0, 1).split(rows) for states in hidden), strict=True)
    parts = [checkpoint(piece, *part, use_reentrant=False, preserve_rng_state=False) for part in pieces]
    return torch.cat(parts, -1)


def has_plain_head(model: nn.Module) -> bool:
    """Return whether the logits are only the output embedding applied to the last hidden state."""
    return model.config.model_type in ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


def _cross_entropy(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(wanted) || softmax(logits)) of every row, FP32 [rows].

    Written so that its gradient, softmax(logits) - softmax(wanted), is exactly 0 where both are equal: AdamW would make
    full steps of what rounding leaves in `F.kl_div`'s.
    """
    normalizer = wanted.logsumexp(-1, keepdim=True)
    expected = ((wanted - normalizer).exp() * (wanted - logits)).sum(-1)
    return expected + logits.logsumexp(-1) - normalizer.squeeze(-1)
