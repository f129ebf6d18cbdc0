"""What names a run: every setting that can change a number of its training; and the runs that it is compared with."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

from qat.config import STREAM_ORDER, Config, QuantConfig, ScalingConfig, WarmupConfig
from qat.quant.rules import RULES

# Of these groups, what cannot change a number of training.
_IRRELEVANT = {
    "model": ("name", "licence", "blocks"),
    "data": ("name", "tokenizer_threads", "retry_hours", "cache"),
    "optim": ("max_skipped",),
}
_OF_TRAINING = ("gradients", "target_gradient", "ste")  # of `quant`, what a forward pass does not know of


def identity(cfg: Config) -> dict:
    """Everything in a configuration that can change a number of training, and nothing else."""
    from qat.utils.device import resolve_arithmetic  # PyTorch takes seconds to import

    parts = {
        group: {k: v for k, v in _chosen(getattr(cfg, group)).items() if k not in skipped}
        for group, skipped in _IRRELEVANT.items()
    }
    if cfg.data.source == "hub":
        parts["data"]["order"] = STREAM_ORDER
    else:  # packaged text is shuffled whole
        parts["data"].pop("shuffle_buffer", None)
    micro, accumulation = cfg.batch
    parts["budget"] = {
        "steps": cfg.steps,
        "micro_batch": micro,
        "accumulation": accumulation,
        "seq_len": cfg.budget.seq_len,
        "arithmetic": resolve_arithmetic(cfg.budget.arithmetic),
    } | {k: v for k, v in _chosen(cfg.budget).items() if k in ("compile", "activation_checkpointing", "largest_logits")}
    if cfg.budget.compile:  # steps that telemetry looks at are not compiled
        parts["budget"]["telemetry_every"] = cfg.budget.telemetry_every
    parts |= {"seed": cfg.seed} | ({"repeat": cfg.repeat} if cfg.repeat else {})
    if cfg.quantized:
        parts["quant"] = _chosen(cfg.quant)
        parts["scaling"] = _effective_scaling(cfg)
        parts["bf16_warmup_steps"] = cfg.bf16_warmup_steps
    return parts


def _chosen(group) -> dict:
    """Return the fields of a configuration group that differ from their defaults, so that an option added later renames
    no run of before."""
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(group)
    }
    return {name: value for name, value in dataclasses.asdict(group).items() if value != defaults[name]}


def _effective_scaling(cfg: Config) -> dict:
    """Return the scaling without what it never looks at: the options of other rules, and without a BF16 warmup whether
    its history is kept or discarded. What `current` leaves unread of `settle` and `update_every`, and a discarded
    history of `observe_in_warmup`, stays: records have runs that are named by it."""
    ignored = {"window", "alpha"} - set(RULES[cfg.scaling.algo].reads)
    if not cfg.bf16_warmup_steps:
        ignored |= {"observe_in_warmup", "discard_after_warmup"}
    return {name: value for name, value in _chosen(cfg.scaling).items() if name not in ignored}


def baseline_of(cfg: Config) -> Config:
    """Return the matched BF16 baseline: the same configuration in everything but quantization."""
    baseline = copy.deepcopy(cfg)
    baseline.quant = QuantConfig(format="none")
    baseline.scaling = ScalingConfig(algo="current")
    baseline.warmup = WarmupConfig()
    return baseline


def pretrained_of(cfg: Config) -> Config:
    """Return the checkpoint before any training, as a configuration to score: a baseline of no steps."""
    pretrained = baseline_of(cfg)
    pretrained.budget.steps = 0
    return pretrained


def is_ptq(mode: str) -> bool:
    """Return whether an evaluation's mode is one of `ptq_mode`."""
    return mode.startswith("ptq-")


def ptq_mode(quant: QuantConfig) -> str:
    """Under which name a baseline's folder keeps the scores of its weights under a quantization: all runs that quantize
    the forward pass alike share them."""
    parts = {name: value for name, value in _chosen(quant).items() if name not in _OF_TRAINING}
    return f"ptq-{digest(parts)}"


def run_id(cfg: Config) -> str:
    """Readable slug plus a hash of `identity`. Characters: letters, digits, '.', '_', '-'."""
    if cfg.budget.steps == 0:
        # Its word in a run's name, which does not change.
        parts, slug = _pretrained_identity(cfg), [cfg.model.name, "untouched"]
    else:
        parts, slug = identity(cfg), [cfg.model.name, *_slug(cfg)]
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in "-".join(slug))
    return f"{safe[:80]}-{digest(parts)}"


def digest(parts: dict | list) -> str:
    """Ten hexadecimal digits that stand for what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def _pretrained_identity(cfg: Config) -> dict:
    whole = identity(cfg)
    return {"model": whole["model"], "arithmetic": whole["budget"]["arithmetic"]} | (
        {"seed": cfg.seed} if cfg.model.source == "random" else {}
    )


def _slug(cfg: Config) -> list[str]:
    words = ["bf16"]
    if cfg.quantized:
        words = [cfg.quant.format, cfg.scaling.algo]
        words += [f"w{cfg.scaling.window}"] if "window" in RULES[cfg.scaling.algo].reads else []
        words += [f"warm{cfg.bf16_warmup_steps}"]
    words += ["twice"] if cfg.data.label_shift == "twice" else []
    repeat = [f"r{cfg.repeat}"] if cfg.repeat else []
    return [*words, f"lr{cfg.optim.lr:g}", f"{cfg.steps}steps", f"s{cfg.seed}", *repeat]


def ptq_of(cfg: Config) -> Config:
    """Return the PTQ beside a quantized run: its baseline under its quantization."""
    ptq = baseline_of(cfg)
    ptq.quant = copy.deepcopy(cfg.quant)
    return with_ptq_scales(ptq)


def with_ptq_scales(cfg: Config) -> Config:
    """Return a quantized run under PTQ's scales in the place of its own, which tells its weights from its scales."""
    found = copy.deepcopy(cfg)
    # A bank that observes while nothing is quantized, and whose scale is what it observed.
    found.scaling = ScalingConfig(algo="most_recent", observe_in_warmup=True, discard_after_warmup=False)
    return found
