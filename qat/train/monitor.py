"""Check a run while it trains for faults that a smooth loss curve does not show.

Every check returns its warnings as rows: kind, size (how bad), for tensors the worst layer and its role, and warning
(what is wrong and what helps). `new_warnings` drops repetitions. The rest goes to the terminal and to warnings.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

from qat.config import Config
from qat.quant.rules import RULES

# Limits past which a check warns.
IMPLAUSIBLE = 0.6  # first loss as a share of ln(vocabulary), the loss of guessing; pretrained models are below 0.4
UNCHANGED_SHARE = 0.5  # of weights that an update leaves as they were
MOVED_SHARE = 1e-6  # of weights that an update moves to another value of the format: 1 % in the paper's 10,000 steps
# In the records of SmolLM2-135M, after the first quantized step, window 64 has at most 19 % of a role's tensors over
# 1.25, and none over 3.3; under most_recent and exp_smooth it is 51 to 61 % of the gradients, and one is at 14.
OVERSHOOT, OVERSHOOT_SHARE = 1.25, 0.25  # and the share of a role's tensors that have it
LARGEST_OVERSHOOT = 4.0  # of one tensor
LOWEST_SQNR = 18.0  # dB of SQNR; if all values had 1 mantissa bit, it would be 20 (with 3 bits 31)
UNDERFLOW_SHARE = 0.1  # of a tensor's values that become zero; healthy runs stay near 0.001
BEYOND_SHARE = 0.01  # of a tensor's values beyond its target; lagging scales alone reach 0.001
FORGOTTEN = 0.1  # nats a token lost on other text: as if a model of 1 B had half the parameters (406.4 / N^0.34,
# Hoffmann et al. 2022)
SCATTER = 0.7  # standard deviation of the change of a token's loss: SmolLM2-135M after 16 steps at lr 1e-4


def new_warnings(warnings: Sequence[dict], earlier: Sequence[dict]) -> list[dict]:
    """Return the warnings that `earlier` ones do not cover: the first of a kind and role, and any twice as bad as the
    last of these. Scales that lag always lag, and would fill pages."""
    last = {_topic(row): row["size"] for row in earlier}
    return [row for row in warnings if row["size"] >= 2 * last.get(_topic(row), 0)]


def _topic(row: dict) -> tuple:
    return row["kind"], row.get("role")


def _warning(kind: str, size: float, text: str, worst: dict | None = None) -> dict:
    """Return a row of warnings.jsonl; worst: the telemetry of the worst tensor, if it is about tensors."""
    tensor = {"layer": worst["layer"], "role": worst["role"]} if worst else {}
    return {"kind": kind, "size": size, **tensor, "warning": text}


def first_loss(cfg: Config, vocabulary: int, loss: float) -> list[dict]:
    """Check the loss of step 1 in nats, before any update: a pretrained model that starts near chance has wrong input.

    The released code's labels, shifted twice, start at 0.95 of ln(vocabulary) (its own log; experiments/README.md).
    """
    share = loss / math.log(vocabulary)
    if cfg.model.source == "random" or not share > IMPLAUSIBLE:
        return []
    why = "check model, tokenizer and labels"
    if cfg.data.label_shift == "twice":
        why = "data.label_shift=twice asks for it"
    text = f"the first loss is {loss:.2f}, {share:.0%} of guessing: not what a pretrained model starts at; {why}"
    return [_warning("first loss", share, text)]


def telemetry(cfg: Config, rows: Sequence[dict], lr: float) -> list[dict]:
    """Check scales and updates in the telemetry of one step (`qat.train.tensor_stats`) at learning rate `lr`."""
    warnings = []
    for role in sorted({row["role"] for row in rows if "role" in row}):
        tensors = [row for row in rows if row.get("role") == role]
        warnings += [check(cfg, role, tensors) for check in (_lagging, _noisy, _vanishing, _beyond)]
    if lr >= cfg.optim.lr / 2:  # at either end of the schedule, updates are meant to be small
        warnings += [_updates(cfg, row["updated"], lr) for row in rows if "updated" in row]
    return [warning for warning in warnings if warning]


def _lagging(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    late, worst = sum(row["overshoot"] > OVERSHOOT for row in rows), max(rows, key=itemgetter("overshoot"))
    learned = RULES[cfg.scaling.algo].learns and role != "gradient"  # then to clip is meant
    if learned or (late < OVERSHOOT_SHARE * len(rows) and worst["overshoot"] < LARGEST_OVERSHOOT):
        return None
    if cfg.scaling.update_every > 1:
        fix = f"scaling.update_every=1 (now {cfg.scaling.update_every})"
    elif cfg.scaling.algo == "max":
        fix = f"a scaling.window larger than {cfg.scaling.window}"
    else:
        fix = "scaling=max window=w64"
    text = f"{role} scales lag: {worst['layer']} is {worst['overshoot']:.2f} times as large as predicted, {late} of "
    text += f"{len(rows)} tensors are over {OVERSHOOT:g}; {fix} would follow better"
    return _warning("lagging scales", worst["overshoot"], text, worst)


def _noisy(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    worst = min(rows, key=lambda row: math.inf if row["sqnr_db"] is None else row["sqnr_db"])
    if worst["sqnr_db"] is None or worst["sqnr_db"] >= LOWEST_SQNR:
        return None
    text = f"{role} SQNR is {worst['sqnr_db']:.1f} dB in {worst['layer']}, below what 1 mantissa bit leaves: overshoot "
    text += f"{worst['overshoot']:.2f}, {worst['beyond']:.1g} of it beyond the target, {worst['underflow']:.1g} made 0"
    return _warning("low SQNR", 10 ** (-worst["sqnr_db"] / 10), text, worst)


def _vanishing(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    worst = max(rows, key=itemgetter("underflow"))
    if worst["underflow"] < UNDERFLOW_SHARE:
        return None
    text = f"{role} underflow: {worst['underflow']:.0%} of {worst['layer']} became zero; a larger quant.target_{role} "
    text += f"or a format of wider range than {cfg.quant.format} would keep them"
    return _warning("underflow", worst["underflow"], text, worst)


def _beyond(cfg: Config, role: str, rows: list[dict]) -> dict | None:
    worst = max(rows, key=itemgetter("beyond"))
    if worst["beyond"] < BEYOND_SHARE:
        return None
    how = "and clipped" if cfg.quant.overflow == "clip" else f"(quant.overflow={cfg.quant.overflow})"
    text = f"{role} values: {worst['beyond']:.1%} of {worst['layer']} are beyond the target {how}; its scale is far "
    text += f"from what the tensor is now (overshoot {worst['overshoot']:.2f})"
    return _warning("beyond the target", worst["beyond"], text, worst)


def _updates(cfg: Config, updated: dict, lr: float) -> dict | None:
    """Check the shares of weights that a step changed.

    Updates are lost to rounding when weights are stored in BF16 and the learning rate is small against them. When they
    all stay below the format's spacing, the quantized model does not change.
    """
    if updated["stored"] < 1 - UNCHANGED_SHARE:
        lost = 1 - updated["stored"]
        fix = "a larger optim.lr" if cfg.optim.master_weights else "optim.master_weights=true or a larger optim.lr"
        text = f"the update left {lost:.0%} of the weights as they were (lr {lr:g}); {fix} would move them"
        return _warning("lost updates", lost, text)
    if updated["format"] is None or updated["format"] >= MOVED_SHARE:
        return None
    text = f"the update moved {updated['format']:.1g} of the weights to another {cfg.quant.format} value (lr {lr:g}): "
    text += "the quantized model stands still; a larger optim.lr would move it"
    return _warning("still weights", 1.0, text)


def forgetting(cfg: Config, rows: Sequence[dict], pretrained: Sequence[dict]) -> list[dict]:
    """Check whether text of another kind than the training data is predicted worse than by the pretrained model.

    rows, pretrained: losses on held-out text (`qat.train.validation`), now and before training.
    """
    before = {(row["text"], row["text_hash"]): row["loss"] for row in pretrained}
    rises = {}
    for row in (row for row in rows if "text" in row):
        start = before.get((row["text"], row["text_hash"]))
        if None not in (start, row["loss"]):
            rises[row["text"]] = row["loss"] - start, row["tokens"]
    own, _ = rises.pop(cfg.data.name, (None, 0))
    return [
        _warning("forgetting", rise, _forgetting_text(cfg, name, rise, noise(tokens), own))
        for name, (rise, tokens) in rises.items()
        if rise > FORGOTTEN + noise(tokens)
    ]


def noise(tokens: int) -> float:
    """Return half of the 95 % interval, in nats a token, of a change of the loss on so many tokens."""
    return 2 * SCATTER / math.sqrt(tokens)


def _forgetting_text(cfg: Config, name: str, rise: float, half: float, own: float | None) -> str:
    beside = "" if own is None else f" (on {cfg.data.name}: {own:+.2f})"
    why = f"a smaller optim.lr than {cfg.optim.lr:g} or fewer steps would keep more"
    if cfg.data.label_shift == "twice":
        why = "data.label_shift=twice trains it to predict something else than the next token"
    text = f"held-out loss on {name} is {rise:+.2f} ± {half:.2f} nats a token from the pretrained model's{beside}"
    return f"{text}: it forgets; {why}"
