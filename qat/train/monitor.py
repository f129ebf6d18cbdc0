"""Checks of a run while it runs, of what a smooth loss curve does not show. Each returns the warnings it has as rows:
kind, size (how bad), warning (what is wrong and what helps), and of tensors also the role and its worst layer.

`news` leaves out what was said before. Warnings go to the terminal and into the run folder's warnings.jsonl. (That
ranks agree is watched in `qat.utils.distributed`.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

from qat.config import Config
from qat.quant.scaling import ScaleBank

IMPLAUSIBLE = 0.6  # of ln(vocabulary), the loss of guessing; sound pretrained models start below 0.4
LOST = 0.5  # share of weights that an update left as they were
STILL = 1e-6  # share of weights that an update moves to another value of the format: 1 % in the paper's 10,000 steps
# In the records of SmolLM2-135M, after the first quantized step, window 64 has at most 19 % of a role's tensors over
# 1.25, and none over 3.3; under most_recent and exp_smooth it is 51 to 61 % of the gradients, and one is at 14.
LATE, WIDESPREAD, FAR = 1.25, 0.25, 4.0  # overshoot; share of a role's tensors that have it; overshoot of one tensor
FLOOR = 18.0  # dB of SQNR; were all values in the tier of 1 mantissa bit, rounding would leave 20 (3 bits: 31)
VANISHED = 0.1  # share of a tensor's values that become zero; sound runs stay near 0.001
BEYOND = 0.01  # share of a tensor's values beyond its target; lagging scales alone reach 0.001
# Nats a token that a text of another kind may lose: what a model of 1 B parameters would lose by having half as many
# (406.4 / N^0.34, Hoffmann et al. 2022); and by how much the change of a single token's loss scatters: measured on
# SmolLM2-135M after 16 steps at lr 1e-4.
FORGOTTEN, SCATTER = 0.1, 0.7


def new_warnings(found: Sequence[dict], said: Sequence[dict]) -> list[dict]:
    """Return those warnings of `found` that the rows `said` before do not tell already: the first of a kind and role,
    and later ones twice as bad as the last. Scales that lag always do, and would fill pages."""
    last = {_about(row): row["size"] for row in said}
    return [row for row in found if row["size"] >= 2 * last.get(_about(row), 0)]


def _about(row: dict) -> tuple:
    return row["kind"], row.get("role")


def first_loss(cfg: Config, vocabulary: int, loss: float) -> list[dict]:
    """Check the loss of step 1 in nats, before any update: a pretrained model that starts near chance is fed wrongly.
    The released code's labels, shifted twice, start at 0.95 of ln(vocabulary) (its own log; experiments/README.md)."""
    share = loss / math.log(vocabulary)
    if cfg.model.source == "random" or not share > IMPLAUSIBLE:
        return []
    why = (
        "data.label_shift=twice asks for it" if cfg.data.label_shift == "twice" else "check model, tokenizer and labels"
    )
    said = f"the first loss is {loss:.2f}, {share:.0%} of guessing: not what a pretrained model starts at; {why}"
    return [{"kind": "first loss", "size": share, "warning": said}]


def telemetry(cfg: Config, rows: Sequence[dict], lr: float) -> list[dict]:
    """Check what the telemetry of one step (`qat.train.tensor_stats`), taken at learning rate `lr`, shows of scales and
    updates."""
    tensors = sorted((row for row in rows if "role" in row), key=itemgetter("role"))
    roles = [(role, list(of_role)) for role, of_role in groupby(tensors, itemgetter("role"))]
    checks = (_lagging, _noisy, _vanishing, _beyond)
    found = [check(cfg, role, of_role) for role, of_role in roles for check in checks]
    if lr >= cfg.optim.lr / 2:  # at either end of the schedule, updates are meant to be small
        found += [_updates(cfg, row["updated"], lr) for row in rows if "updated" in row]
    return [each for each in found if each]


def _lagging(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    late, worst = sum(row["overshoot"] > LATE for row in rows), max(rows, key=itemgetter("overshoot"))
    if late < WIDESPREAD * len(rows) and worst["overshoot"] < FAR:
        return None
    slow = {"max": f"a scaling.window larger than {cfg.scaling.window}"}.get(cfg.scaling.algo, "scaling=max window=w64")
    fix = f"scaling.update_every=1 (now {cfg.scaling.update_every})" if cfg.scaling.update_every > 1 else slow
    return _tensor(
        "lagging scales",
        worst["overshoot"],
        worst,
        f"{role} scales lag: {worst['layer']} is {worst['overshoot']:.2f} times as large as predicted, {late} of "
        f"{len(rows)} tensors are over {LATE:g}; {fix} would follow better",
    )


def _noisy(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    worst = min(rows, key=lambda row: math.inf if row["sqnr_db"] is None else row["sqnr_db"])
    if worst["sqnr_db"] is None or worst["sqnr_db"] >= FLOOR:
        return None
    return _tensor(
        "low SQNR",
        10 ** (-worst["sqnr_db"] / 10),
        worst,
        f"{role} SQNR is {worst['sqnr_db']:.1f} dB in {worst['layer']}, below what 1 mantissa bit leaves: overshoot "
        f"{worst['overshoot']:.2f}, {worst['beyond']:.1g} of it beyond the target, {worst['underflow']:.1g} made 0",
    )


def _vanishing(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    worst = max(rows, key=itemgetter("underflow"))
    if worst["underflow"] < VANISHED:
        return None
    return _tensor(
        "underflow",
        worst["underflow"],
        worst,
        f"{role} underflow: {worst['underflow']:.0%} of {worst['layer']} became zero; a larger quant.target_{role} or "
        f"a format of wider range than {cfg.quant.format} would keep them",
    )


def _beyond(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    worst = max(rows, key=itemgetter("beyond"))
    if worst["beyond"] < BEYOND:
        return None
    fate = "and clipped" if cfg.quant.overflow == "clip" else f"(quant.overflow={cfg.quant.overflow})"
    return _tensor(
        "beyond the target",
        worst["beyond"],
        worst,
        f"{role} values: {worst['beyond']:.1%} of {worst['layer']} are beyond the target {fate}; its scale is far from "
        f"what the tensor is now (overshoot {worst['overshoot']:.2f})",
    )


def forgetting(cfg: Config, rows: Sequence[dict], pretrained: Sequence[dict]) -> list[dict]:
    """Check what held-out losses (`qat.train.validation`) show beside those before training: a text of another kind
    than the training data that is predicted worse than by the pretrained model."""
    before = {(row["text"], row["text_hash"]): row["loss"] for row in pretrained}
    rises = {}
    for row in (row for row in rows if "text" in row):
        start = before.get((row["text"], row["text_hash"]))
        if None not in (start, row["loss"]):
            rises[row["text"]] = row["loss"] - start, row["tokens"]
    own, _ = rises.pop(cfg.data.name, (None, 0))
    return [
        _forgotten(cfg, text, rise, noise(tokens), own)
        for text, (rise, tokens) in rises.items()
        if rise > FORGOTTEN + noise(tokens)
    ]


def noise(tokens: int) -> float:
    """Half of the 95 % interval, in nats a token, that a change of the loss on so many tokens has."""
    return 2 * SCATTER / math.sqrt(tokens)


def _forgotten(cfg: Config, text: str, rise: float, half: float, own: float | None) -> dict:
    beside = "" if own is None else f" (on {cfg.data.name}: {own:+.2f})"
    why = f"a smaller optim.lr than {cfg.optim.lr:g} or fewer steps would keep more"
    if cfg.data.label_shift == "twice":
        why = "data.label_shift=twice trains it to predict something else than the next token"
    said = f"held-out loss on {text} is {rise:+.2f} ± {half:.2f} nats a token from the pretrained model's{beside}"
    said += f": it forgets; {why}"
    return {"kind": "forgetting", "size": rise, "warning": said}


def _tensor(kind: str, size: float, worst: dict, said: str) -> dict:
    return {"kind": kind, "size": size, "layer": worst["layer"], "role": worst["role"], "warning": said}


def _updates(cfg: Config, updated: dict, lr: float) -> dict | None:
    """Check the shares of weights that a step changed: most are lost to rounding when weights are stored in BF16 and
    the learning rate is small against them, or all stay below the format's spacing, and the quantized model stands
    still."""
    if updated["stored"] < 1 - LOST:
        lost = 1 - updated["stored"]
        fix = "a larger optim.lr" if cfg.optim.master_weights else "optim.master_weights=true or a larger optim.lr"
        said = f"the update left {lost:.0%} of the weights as they were (lr {lr:g}); {fix} would move them"
        return {"kind": "lost updates", "size": lost, "warning": said}
    if updated["format"] is None or updated["format"] >= STILL:
        return None
    said = (
        f"the update moved {updated['format']:.1g} of the weights to another {cfg.quant.format} value (lr {lr:g}): the "
        f"quantized model stands still; a larger optim.lr would move it"
    )
    return {"kind": "still weights", "size": 1.0, "warning": said}


class History:
    """Checks that the amax history advances as often as the steps say."""

    def __init__(self, bank: ScaleBank):
        self.bank, self.ticks = bank, int(bank.written)

    def begin(self) -> None:
        """Quantization starts, and the history may be dropped."""
        self.ticks = 0

    def advance(self, ticks: int) -> None:
        """Count the ticks of a finite quantized step."""
        self.ticks += ticks

    def check(self) -> list[dict]:
        entries = len(self.bank.history)
        expected, found = min(entries, self.ticks), min(entries, int(self.bank.written))
        if found >= expected:
            return []
        said = f"the amax history holds {found} entries where {expected} were written: scales are of the past"
        return [{"kind": "standing history", "size": expected - found, "warning": said}]
