"""Measure the loss on held-out text while a run trains: on its own kind of text, and on another to see forgetting.

Validation is a forward pass in eval mode and in the arithmetic of training; it quantizes where training does, with the
current scales. It changes no weights, gradients, scales or random numbers: training is the same with it and without.
"""

from __future__ import annotations

import contextlib
import math

import torch

from qat.config import Config
from qat.data import heldout
from qat.errors import UserError
from qat.train.step import Trainer, eagerly
from qat.utils import device, distributed, environment


class Validator:
    """Measure a model's loss on the held-out texts of a run; with validation=none there are none."""

    def __init__(self, trainer: Trainer, tokenizer, cfg: Config):
        self.trainer, self.cfg = trainer, cfg
        # Only the first rank reads. All ranks compute, because parameters may be sharded over them.
        self.texts = distributed.broadcast_object(
            _texts(cfg, tokenizer) if cfg.validation and environment.is_main_process() else {}
        )

    @torch.no_grad()
    def rows(self, step: int) -> list[dict]:
        """Return one row for each text where validation is due after `step` steps, else [].

        It is due before the first step, after every k-th and after the last: at the same steps in a run and its
        baseline. Columns: step, text (its name), loss in nats a token (None: not finite), tokens, text_hash.
        """
        if not self.texts or (step % self.cfg.budget.telemetry_every and step != self.cfg.steps):
            return []
        rows, losses = [], self._losses().cpu().split([len(text.tokens) for text in self.texts.values()])
        for (name, text), text_losses in zip(self.texts.items(), losses, strict=True):
            loss = float(text_losses.mean())
            row = {"step": step, "text": name, "loss": loss if math.isfinite(loss) else None}
            rows.append(row | {"tokens": text_losses.numel(), "text_hash": text.hash})
        return rows

    def _losses(self) -> torch.Tensor:
        """Return the losses of every token of all texts, FP32 [sequences, HELDOUT_LENGTH]."""
        tokens = torch.cat([text.tokens for text in self.texts.values()])
        micro_batch = self.cfg.batch[0] * self.cfg.budget.seq_len  # tokens: so many fit into memory
        batches = map(device.to_device, tokens.split(max(1, micro_batch // heldout.HELDOUT_LENGTH)))
        losses = self.trainer.losses.eval()
        bank = self.trainer.bank
        try:
            with bank.paused() if bank is not None else contextlib.nullcontext():
                self.trainer.round_weights()
                with device.autocast(self.trainer.arithmetic), eagerly():
                    return torch.cat([losses(batch) for batch in batches])
        finally:
            losses.train()
            if distributed.is_sharded(losses):
                losses.reshard()  # FSDP frees gathered parameters only after a backward pass


def _texts(cfg: Config, tokenizer) -> dict[str, heldout.Heldout]:
    """Return the texts by name, the training data's own first."""
    wanted = cfg.budget.validation_tokens
    own = heldout.load_heldout(cfg.data, tokenizer, wanted)
    try:
        return {cfg.data.name: own, cfg.validation.name: heldout.load_heldout(cfg.validation, tokenizer, wanted)}
    except UserError as error:
        raise UserError(f"{error}; or go without: validation=none") from error
