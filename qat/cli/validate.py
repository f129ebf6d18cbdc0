"""Which configurations make sense, beyond what their types say. Each refusal is one line that names the fix."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from qat import config
from qat.cli.validate_quant import check_quant
from qat.config import GROUPS, Config, PTQConfig, SensitivityConfig, ValidationConfig
from qat.errors import ConfigError, nearest
from qat.eval.benchmarks import TASKS
from qat.quant.formats import FORMATS
from qat.quant.ptq import rung
from qat.quant.rules import RULES, named
from qat.utils import files
from qat.utils.environment import ROOT


def validate(cfg: Config) -> None:
    """Raise `ConfigError` for values and combinations that the types allow and a run does not."""
    for key, choices in CHOICES.items():
        value = attrgetter(key)(cfg)
        if value not in choices:
            raise ConfigError(f"{key}={value}: unknown value; {nearest(value, choices)}")
    for key, low, high in _RANGES:
        value = attrgetter(key)(cfg)
        if value is not None and not low <= value <= high:
            bound = low if value < low else high
            raise ConfigError(f"{key}={value}: must lie in [{low}, {high}]; the nearest valid value is {bound}")
    seeds = cfg.seeds or []
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
        raise ConfigError(f"seeds={seeds}: must be different seeds from 0 up, as in [0,1,2]")
    if cfg.launch.launcher != "slurm" and (cfg.launch.nodes > 1 or cfg.launch.sbatch):
        key, value = ("nodes", cfg.launch.nodes) if cfg.launch.nodes > 1 else ("sbatch", cfg.launch.sbatch)
        raise ConfigError(f"launch.{key}={value}: is for launch.launcher=slurm; leave it out")
    texts = (_check_sources, _check_validation, _check_benchmark, _check_sensitivity, _check_ptq)
    for check in (_check_names, _check_batch, _check_warmup, _check_training, check_quant, _check_rules, *texts):
        check(cfg)


# Of every key that has a fixed choice; rules and formats name themselves.
CHOICES = config.CHOICES | {
    "scaling.algo": tuple(RULES),
    "quant.format": ("none", *FORMATS),
    "sensitivity.task": tuple(name for name in TASKS if name != "lambada"),  # which has no choices
}

_INF, _MANY = float("inf"), 2**31 - 1
_RANGES = [
    ("seed", 0, 2**31 - 1),
    ("repeat", 0, 1000),
    ("data.duplicate_workers", 1, 64),
    ("data.tokenizer_threads", 1, 256),
    ("budget.heldout_tokens", 1, _MANY),
    ("budget.validation_tokens", 1, _MANY),
    ("data.shuffle_buffer", 1, _MANY),
    ("data.retry_hours", 0, _INF),
    ("optim.lr", 1e-12, 10),
    ("optim.beta1", 0, 0.9999),
    ("optim.beta2", 0, 0.99999),
    ("optim.eps", 1e-30, 1),
    ("optim.weight_decay", 0, 10),
    ("optim.clip", 1e-12, _INF),
    ("optim.lr_warmup", 0, 1),
    ("optim.max_skipped", 0, _MANY),
    ("loss.distill", 0, 1),
    ("quant.bf16_blocks", 0, _MANY),
    ("quant.target_activation", 2**-22, 57344),
    ("quant.target_weight", 2**-22, 57344),
    ("quant.target_gradient", 2**-22, 57344),
    ("quant.cage", 0, _INF),
    ("quant.cage_silent", 0, 1),
    ("scaling.window", 1, 65536),
    ("scaling.alpha", 0, 1),
    ("scaling.lr", 0, _INF),
    ("scaling.update_every", 1, _MANY),
    ("scaling.guard", 0, 15),
    ("scaling.settle", 0, 1),
    ("warmup.bf16", 0, 1),
    ("budget.steps", 1, _MANY),
    ("budget.micro_batch", 1, 2**16),
    ("budget.accumulation", 1, 2**20),
    ("budget.seq_len", 4, 2**20),
    ("budget.steps_factor", 1e-6, 1),
    ("budget.batch_factor", 1e-6, 1),
    ("budget.checkpoint_every", 1, _MANY),
    ("budget.telemetry_every", 1, _MANY),
    ("bench.rounds", 1, _MANY),
    ("ptq.sequences", 1, 2**16),
    ("ptq.tokens", 4, 2**20),
    ("sensitivity.tokens", 1, _MANY),
    ("sensitivity.questions", 0, _MANY),
    ("launch.ranks", 1, _MANY),
    ("launch.nodes", 1, _MANY),
    ("budget.largest_logits", 2**16, _INF),
    ("benchmark.batch_size", 1, _MANY),
]


# Variables whose bad values libraries ignore or answer at length: what they must look like, and an example.
_VARIABLES = {
    "OMP_NUM_THREADS": (r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", "2"),
    "NUMBA_NUM_THREADS": (r"[1-9]\d{0,3}", "2"),
    "NUMBA_DISABLE_JIT": (r"0", "0"),  # the kernels are nothing without
    "CUDA_VISIBLE_DEVICES": (r"(-?\d+|(GPU|MIG)-[\w/-]+)(,(-?\d+|(GPU|MIG)-[\w/-]+))*", "0,1"),
    "HIF8_ARITHMETIC": (r"auto|bf16|fp32", "bf16"),
    "WANDB_MODE": (r"online|offline|disabled|shared|dryrun|run", "offline"),
}
# What torchrun sets; empty is unset. Ranks are looped over: a number that no cluster has would never end.
_RANKS = {"WORLD_SIZE": (r"[1-9]\d{0,5}", "2"), "RANK": (r"\d{1,6}", "0"), "LOCAL_RANK": (r"\d{1,6}", "0")}


_LAUNCHERS = {  # as conf/hydra/launcher has them, and what they are made of
    **dict.fromkeys(("local", "joblib"), "hydra_plugins.hydra_joblib_launcher"),
    **dict.fromkeys(("slurm", "submitit_slurm"), "hydra_plugins.hydra_submitit_launcher"),
}


def validate_surroundings(overrides: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` for overrides that lead out of conf/, ask for a launcher that is not installed, or give a
    group a number, where Hydra does not say which one it is; and for malformed environment variables."""
    for override in overrides:
        group, _, option = override.partition("=")
        if ".." in option.split("/") and "." not in group:
            raise ConfigError(
                f"{override}: leads out of its folder; name a file of conf/{group.lstrip('+')} or a folder by its full "
                f"path"
            )
        plugin = _LAUNCHERS.get(option) if group == "hydra/launcher" else None
        if plugin and not importlib.util.find_spec(plugin):
            raise ConfigError(f"{override}: its plugin is not installed; pip install -e '.[launchers]'")
        names = sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml")) if group.isidentifier() else []
        if names and re.match(r"[-+.]?\d", option) and option.partition(",")[0] not in names:
            raise ConfigError(f"{override}: is a group and takes a name; choose one of {', '.join(names)}")
    _check_variables(_VARIABLES, environ)


def validate_ranks(environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` for environment variables that make this process no rank of any number of them."""
    _check_variables(_RANKS, environ)
    rank, size = environ.get("RANK") or "0", environ.get("WORLD_SIZE") or "1"
    if int(rank) >= int(size):
        raise ConfigError(
            f"RANK={rank}: must be below WORLD_SIZE={size}; start all processes with torchrun, or unset RANK"
        )


def _check_variables(patterns: Mapping[str, tuple[str, str]], environ: Mapping[str, str]) -> None:
    for name, (pattern, example) in patterns.items():
        value = environ.get(name, "")
        if value and not re.fullmatch(pattern, value):
            raise ConfigError(
                f"{name}={value}: the environment variable is malformed or not supported; set it as in {name}={example}"
            )


# What becomes a file, a folder or a name in a mirror must not lead anywhere else.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")


def _check_names(cfg: Config) -> None:
    keys = ("model.name", "data.name", "benchmark.name", "budget.name", "logger.project")
    names = [(key, attrgetter(key)(cfg)) for key in keys]
    names += [("experiment", cfg.experiment or "none")]
    names += [("validation.name", cfg.validation.name)] if cfg.validation else []
    names += [("report.experiments", name) for name in cfg.report.experiments]
    names += [("benchmark.tasks", name) for name in cfg.benchmark.tasks]
    for key, name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{key}={name[:80]!r}: must be a name of at most 80 letters, digits, '.', '_' and '-' that does not "
                f"start with '.'"
            )
    for key in ("runs_dir", "report.out", "bench.out", "export.out"):
        folder = attrgetter(key)(cfg)
        if folder is not None and not (folder.strip() and folder.isprintable()):
            raise ConfigError(f"{key}={folder!r}: must name a folder, as in {key}=results")


def _check_batch(cfg: Config) -> None:
    accumulation = cfg.budget.accumulation
    if cfg.calls(accumulation) is None:
        raise ConfigError(
            f"budget.accumulation={accumulation}: times batch_factor={cfg.batch_factor} is no whole number of calls of "
            f"equal size; the nearest valid value is {cfg.nearest_accumulation()}"
        )


def _check_warmup(cfg: Config) -> None:
    if cfg.quantized and cfg.bf16_warmup_steps >= cfg.steps:
        raise ConfigError(
            f"warmup.bf16={cfg.warmup.bf16:g}: quantization would start at step {cfg.bf16_warmup_steps + 1} of "
            f"{cfg.steps}; the largest valid share is {(cfg.steps - 1) / cfg.steps:.4g}"
        )
    if cfg.lr_warmup_steps >= cfg.steps and cfg.steps > 1:
        raise ConfigError(
            f"optim.lr_warmup={cfg.optim.lr_warmup:g}: the learning rate would never leave its warmup; the largest "
            f"valid share is {(cfg.steps - 1) / cfg.steps:.4g}"
        )
    if cfg.optim.lr_from_zero and not cfg.lr_warmup_steps:
        raise ConfigError("optim.lr_from_zero=true: optim.lr_warmup=0 has no first step; set optim.lr_from_zero=false")


def _check_training(cfg: Config) -> None:
    if cfg.optim.pure_bf16 and cfg.optim.master_weights:
        raise ConfigError("optim.pure_bf16=true: leaves no FP32 master weights; set optim.master_weights=false")
    if cfg.optim.pure_bf16 and cfg.budget.arithmetic != "bf16":
        raise ConfigError("optim.pure_bf16=true: trains and scores in BF16; set budget.arithmetic=bf16")
    if cfg.optim.pure_bf16 and cfg.optim.moments != "fp32":
        raise ConfigError(f"optim.moments={cfg.optim.moments}: optim.pure_bf16=true has them in BF16; leave it out")
    if cfg.loss.distill and cfg.data.label_shift == "twice":
        raise ConfigError(
            f"loss.distill={cfg.loss.distill:g}: the pretrained model predicts the next token, data.label_shift=twice "
            f"trains the one after; set data.label_shift=once or loss=ce"
        )
    if cfg.optim.moments == "hif8" and cfg.budget.parallel == "fsdp":
        raise ConfigError(
            "optim.moments=hif8: a moment has one scale, and budget.parallel=fsdp spreads it over ranks; set "
            "optim.moments=bf16 or budget.parallel=ddp"
        )


def _check_rules(cfg: Config) -> None:
    ranges = {key.removeprefix("scaling."): ends for key, *ends in _RANGES if key.startswith("scaling.")}
    shadow = cfg.scaling.shadow
    for key, names in (("scaling.shadow", shadow), ("replay.rules", cfg.replay.rules)):
        for name in names:
            for field, value in vars(named(name, cfg.scaling, key)).items():
                low, high = ranges.get(field, (value, value))
                if not low <= value <= high:
                    raise ConfigError(f"{key}={name}: {field} must lie in [{low}, {high}]")
    if not cfg.replay.rules:
        raise ConfigError("replay.rules=[]: nothing to replay; name rules as in [most_recent,max:64]")
    if len(set(shadow)) < len(shadow):
        raise ConfigError(f"scaling.shadow={shadow}: names a rule twice; name each once")
    for key, value in (("budget.parallel", "fsdp"), ("scaling.tick", "call"), ("scaling.sync", "none")):
        if shadow and attrgetter(key)(cfg) == value:  # gradients in shards; amaxes that are not those of the trace
            raise ConfigError(f"scaling.shadow={shadow}: cannot be tried with {key}={value}; leave one of them out")


def _check_sources(cfg: Config) -> None:
    if cfg.model.source != "random" and not cfg.model.path:
        raise ConfigError(
            f"model.path=null: model.source={cfg.model.source} needs one, as in model.path=HuggingFaceTB/SmolLM2-135M"
        )
    if cfg.model.source == "random" and not cfg.model.architecture:
        raise ConfigError("model.architecture=null: model.source=random needs sizes, as in model=tiny")
    for key, text, example in (("data", cfg.data, "fineweb"), ("validation", cfg.validation, "wikipedia")):
        if text and not text.path:
            raise ConfigError(f"{key}.path=null: {key}.source={text.source} needs a path, as in {key}={example}")
        if text and text.cache and text.source != "hub":
            raise ConfigError(f"{key}.cache=true: {key}.source={text.source} is not streamed; set {key}.cache=false")
        if text and text.subset and text.source != "hub":
            raise ConfigError(f"{key}.subset={text.subset}: {key}.source={text.source} has none; leave it out")
    for key, part in (("model", cfg.model), ("data", cfg.data), ("validation", cfg.validation)):
        is_folder = part and part.source == "hub" and Path(files.expand(part.path)).is_dir()
        if part and part.revision and (is_folder or part.source not in ("hub", "prepared")):
            what = "a folder" if is_folder else f"{key}.source={part.source}"
            raise ConfigError(f"{key}.revision={part.revision}: {what} has none; leave it out")


def _check_validation(cfg: Config) -> None:
    if cfg.validation is None:
        return
    if cfg.validation.source not in CHOICES["data.source"]:
        fix = nearest(cfg.validation.source, CHOICES["data.source"])
        raise ConfigError(f"validation.source={cfg.validation.source}: unknown value; {fix}")
    if cfg.validation.tokens is not None and cfg.validation.tokens < 1:
        raise ConfigError(
            f"validation.tokens={cfg.validation.tokens}: must be 1 or more; null: half of budget.heldout_tokens"
        )
    for key in ("label_shift", "duplicate_workers", "tokenizer_threads", "shuffle_buffer"):
        value = getattr(cfg.validation, key)
        if value != getattr(ValidationConfig, key):
            raise ConfigError(f"validation.{key}={value}: has no effect on a text that is only measured; leave it out")
    if cfg.validation.name == cfg.data.name:
        raise ConfigError(
            f"validation.name={cfg.validation.name}: is the text trained on, not one of another kind; give it another "
            f"name, or go without by validation=none"
        )


def _check_benchmark(cfg: Config) -> None:
    for name, task in cfg.benchmark.tasks.items():
        if name not in TASKS:
            raise ConfigError(f"benchmark.tasks.{name}: unknown task; {nearest(name, TASKS)}")
        for key, value, low in (("shots", task.shots, 0), ("limit", task.limit, 1)):
            if value is not None and value < low:
                raise ConfigError(f"benchmark.tasks.{name}.{key}={value}: the nearest valid value is {low}")


def _check_sensitivity(cfg: Config) -> None:
    asked = cfg.sensitivity
    for value in asked.groups:
        if value not in GROUPS:
            raise ConfigError(f"sensitivity.groups={value}: unknown value; {nearest(value, GROUPS)}")
    if not asked.groups or len(set(asked.groups)) < len(asked.groups):
        raise ConfigError(f"sensitivity.groups={asked.groups}: must be some of {', '.join(GROUPS)}, once each")
    for key in ("questions", "task") if not (asked.questions and {"role", "block"} & set(asked.groups)) else ():
        value = getattr(asked, key)
        if value and value != getattr(SensitivityConfig, key):
            raise ConfigError(
                f"sensitivity.{key}={value}: no question is asked with sensitivity.questions=0, or without role and "
                f"block in sensitivity.groups; leave it out"
            )


def _check_ptq(cfg: Config) -> None:
    ptq = cfg.ptq
    for name in ptq.rungs:
        rung(name)
    for name in ptq.questions:
        rung(name, "ptq.questions")
    if len(set(ptq.rungs)) < len(ptq.rungs) or "max" not in ptq.rungs:
        raise ConfigError(
            f"ptq.rungs=[{','.join(ptq.rungs)}]: must be different rows, one of them max, which the others are "
            f"compared with"
        )
    for name in ptq.questions:
        if name not in ptq.rungs and ptq.questions != PTQConfig().questions:
            raise ConfigError(f"ptq.questions={name}: is no row of ptq.rungs; {nearest(name, ptq.rungs)}")
