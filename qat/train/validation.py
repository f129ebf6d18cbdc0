"""Loss on held-out text while a run trains: of the kind that it trains on, and of another kind, where forgetting shows.

Validation is a forward pass in eval mode and in the arithmetic of training: a quantized run's with its current scales,
before quantization starts without any. It leaves weights, gradients, scales and random numbers as they are, so a run
with it is, bit for bit where the machine repeats itself, the run without.
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
    """The held-out texts of a run, and its model's loss on them; with validation=none there are none."""

    def __init__(self, trainer: Trainer, tokenizer, cfg: Config):
        self.trainer, self.cfg = trainer, cfg
        # The first rank alone reads, and all take part: parameters may be spread over them.
        self.texts = distributed.broadcast_object(
            _texts(cfg, tokenizer) if cfg.validation and environment.is_main_process() else {}
        )

    @torch.no_grad()
    def rows(self, step: int) -> list[dict]:
        """Return one row a text after `step` steps, where it is due: before the first, at every k-th and after the
        last, so at the same ones in a run and its baseline. Columns: step, text (its name), loss in nats a token (None
        where it is not finite), tokens, text_hash."""
        if not self.texts or (step % self.cfg.budget.telemetry_every and step != self.cfg.steps):
            return []
        rows, losses = [], self._losses().cpu().split([len(text.tokens) for text in self.texts.values()])
        for (name, text), of_text in zip(self.texts.items(), losses, strict=True):
            loss = float(of_text.mean())
            row = {"step": step, "text": name, "loss": loss if math.isfinite(loss) else None}
            rows.append(row | {"tokens": of_text.numel(), "text_hash": text.hash})
        return rows

    def _losses(self) -> torch.Tensor:
        """Return the losses of every token of all texts, FP32 [sequences, HELDOUT_LENGTH]."""
        tokens = torch.cat([text.tokens for text in self.texts.values()])
        micro_batch = self.cfg.batch[0] * self.cfg.budget.seq_len  # tokens that there is room for
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
            if distributed.is_sharded(
                losses
            ):  # only a backward pass would take away what the forward pass has gathered
                losses.reshard()


def _texts(cfg: Config, tokenizer) -> dict[str, heldout.Heldout]:
    """Return the texts by name, the training data's own first."""
    wanted = cfg.budget.validation_tokens
    own = heldout.load_heldout(cfg.data, tokenizer, wanted)
    try:
        return {cfg.data.name: own, cfg.validation.name: heldout.load_heldout(cfg.validation, tokenizer, wanted)}
    except UserError as error:
        raise UserError(f"{error}; or go without: validation=none") from error
