"""Name a run by every setting that can change a number of its training; derive the runs that it is compared with."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping

from qat.config import ROLES, STREAM_ORDER, Config, QuantConfig, ScalingConfig, WarmupConfig
from qat.quant.rules import RULES

# Settings of these groups that cannot change a number of training.
_IRRELEVANT = {
    "model": ("name", "licence", "blocks"),
    "data": ("name", "tokenizer_threads", "retry_hours", "cache"),
    "optim": ("max_skipped",),
}
# Settings of `quant` without effect on a forward pass.
_BACKWARD_ONLY = ("gradients", "target_gradient", "rounding", "ste", "cage", "cage_silent")
_BUDGET_OPTIONS = ("compile", "activation_checkpointing", "largest_logits")


def identity(cfg: Config) -> dict:
    """Return everything in a configuration that can change a number of training, and nothing else."""
    from qat.utils.device import resolve_arithmetic  # PyTorch takes seconds to import

    parts = {
        group: {key: value for key, value in _changed(getattr(cfg, group)).items() if key not in irrelevant}
        for group, irrelevant in _IRRELEVANT.items()
    }
    if cfg.data.source == "hub":
        parts["data"]["order"] = STREAM_ORDER
    else:  # all documents are shuffled together
        parts["data"].pop("shuffle_buffer", None)
    micro, accumulation = cfg.batch
    parts["budget"] = {
        "steps": cfg.steps,
        "micro_batch": micro,
        "accumulation": accumulation,
        "seq_len": cfg.budget.seq_len,
        "arithmetic": resolve_arithmetic(cfg.budget.arithmetic),
    } | {key: value for key, value in _changed(cfg.budget).items() if key in _BUDGET_OPTIONS}
    if cfg.budget.compile:  # steps with telemetry run eagerly, and compiled code may round otherwise
        parts["budget"]["telemetry_every"] = cfg.budget.telemetry_every
    parts["seed"] = cfg.seed
    if cfg.repeat:
        parts["repeat"] = cfg.repeat
    if loss := _changed(cfg.loss):
        parts["loss"] = loss
    if cfg.quantized:
        parts["quant"] = _changed(cfg.quant)
        for role in ROLES:
            if not getattr(cfg.quant, f"{role}s"):  # what is not rounded has no target
                parts["quant"].pop(f"target_{role}", None)
        if cfg.scaling.algo == "current":  # by its own amax no value is clipped, and masked
            parts["quant"].pop("ste", None)
        parts["scaling"] = _effective_scaling(cfg)
        parts["bf16_warmup_steps"] = cfg.bf16_warmup_steps
    return parts


def _changed(group) -> dict:
    """Return the settings of a configuration group that differ from their defaults.

    Defaults are left out so that a setting added later does not rename earlier runs.
    """
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(group)
    }
    return {name: value for name, value in dataclasses.asdict(group).items() if value != defaults[name]}


def _effective_scaling(cfg: Config) -> dict:
    """Return the scaling settings without those that have no effect: of other rules, of a warmup that is not there.

    `settle` and `update_every` have no effect under the rule `current`, nor `observe_in_warmup` where the history is
    discarded. They stay, because recorded runs are named by them.
    """
    ignored = {"shadow"} | {"window", "alpha", "lr"} - set(RULES[cfg.scaling.algo].reads)
    if not cfg.bf16_warmup_steps:
        ignored |= {"observe_in_warmup", "discard_after_warmup"}
    return {name: value for name, value in _changed(cfg.scaling).items() if name not in ignored}


def baseline_of(cfg: Config) -> Config:
    """Return the matched BF16 baseline: the same configuration in everything but quantization."""
    baseline = copy.deepcopy(cfg)
    baseline.quant = QuantConfig(format="none")
    baseline.scaling = ScalingConfig(algo="current")
    baseline.warmup = WarmupConfig()
    return baseline


def pretrained_of(cfg: Config) -> Config:
    """Return the pretrained model as a configuration to score: a baseline of no steps."""
    pretrained = baseline_of(cfg)
    pretrained.budget.steps = 0
    return pretrained


def heldout_texts(cfg: Config) -> dict:
    """Return what names the held-out texts that a model is scored on, JSON-able."""
    data, kind = cfg.data, cfg.validation
    heldout = {"path": data.path, "subset": data.subset, "tokens": cfg.budget.heldout_tokens, "by": "document"}
    texts = {"heldout": heldout | ({"revision": data.revision} if data.revision else {})}
    if kind is None:
        return texts
    own = {key: value for key, value in _changed(kind).items() if key in ("column", "tokens")}
    return texts | {"validation": {"path": kind.path, "subset": kind.subset, "revision": kind.revision} | own}


def pretrained_mode(request: Mapping) -> str:
    """Return the name of the evaluation of the pretrained model, which has one folder for all texts, on those of a
    request: `heldout_texts`, and whatever else was asked."""
    return f"bf16-{digest({key: request[key] for key in ('heldout', 'validation') if key in request})}"


def is_ptq(mode: str) -> bool:
    """Return whether an evaluation's mode comes from `ptq_mode`."""
    return mode.startswith("ptq-")


def ptq_mode(quant: QuantConfig, method: Mapping | None = None) -> str:
    """Return the name of the evaluation of a baseline's weights under a quantization.

    All runs with the same quantization in the forward pass share it. method: what makes its PTQ another one than max
    calibration on the usual text, JSON-able.
    """
    parts = {name: value for name, value in _changed(quant).items() if name not in _BACKWARD_ONLY}
    parts |= {"ptq": dict(method)} if method else {}
    return f"ptq-{digest(parts)}"


def ptq_of(cfg: Config) -> Config:
    """Return the PTQ that a quantized run is compared with: its baseline under its quantization."""
    ptq = baseline_of(cfg)
    ptq.quant = copy.deepcopy(cfg.quant)
    return with_ptq_scales(ptq)


def with_ptq_scales(cfg: Config) -> Config:
    """Return a quantized run with PTQ's scales instead of its own, which separates its weights from its scales."""
    copied = copy.deepcopy(cfg)
    # Records amaxes while nothing is quantized, and takes the recorded amax as the predicted one.
    copied.scaling = ScalingConfig(algo="most_recent", observe_in_warmup=True, discard_after_warmup=False)
    return copied


def run_id(cfg: Config) -> str:
    """Return a readable slug and a hash of `identity`, in letters, digits, '.', '_' and '-'."""
    if cfg.budget.steps == 0:
        parts, slug = _pretrained_identity(cfg), [cfg.model.name, "untouched"]  # as in recorded runs
    else:
        parts, slug = identity(cfg), [cfg.model.name, *_slug(cfg)]
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in "-".join(slug))
    return f"{safe[:80]}-{digest(parts)}"


def digest(parts: dict | list) -> str:
    """Return a hash of what JSON can hold, ten hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def _pretrained_identity(cfg: Config) -> dict:
    parts = identity(cfg)
    seed = {"seed": cfg.seed} if cfg.model.source == "random" else {}
    return {"model": parts["model"], "arithmetic": parts["budget"]["arithmetic"]} | seed


def _slug(cfg: Config) -> list[str]:
    slug = ["bf16"]
    if cfg.quantized:
        window = [f"w{cfg.scaling.window}"] if "window" in RULES[cfg.scaling.algo].reads else []
        slug = [cfg.quant.format, cfg.scaling.algo, *window, f"warm{cfg.bf16_warmup_steps}"]
        slug += ["cage"] if cfg.quant.cage else []
    slug += ["distill"] if cfg.loss.distill else []
    if cfg.data.label_shift == "twice":
        slug.append("twice")
    slug += [f"lr{cfg.optim.lr:g}", f"{cfg.steps}steps", f"s{cfg.seed}"]
    return [*slug, f"r{cfg.repeat}"] if cfg.repeat else slug
