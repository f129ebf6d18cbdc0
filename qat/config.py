"""The typed configuration: what a run is made of, and which combinations make sense.

Hydra composes `conf/` onto these dataclasses, so an unknown key or a wrong type is refused while composing;
`validate` refuses what types cannot say. Both end in a `ConfigError` of one line that names the key, the value and
the nearest valid choice, before any model is loaded.

The defaults below are part of every run's name, which leaves them out (`qat.runs.identity`): a new field may have any
default that keeps old runs what they were, and a default never changes afterwards.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

ROLES = ("activation", "weight", "gradient")

CHOICES = {
    "protocol": ("paper", "released"),
    "model.source": ("package", "hub", "random"),
    "data.source": ("package", "hub", "files"),
    "data.label_shift": ("once", "twice"),
    "quant.format": ("none", "hif8", "fp8_e4m3", "fp8_e5m2"),
    "quant.overflow": ("clip", "saturate", "inf"),
    "quant.ste": ("pass_through", "masked"),
    "quant.operands": ("exact", "descaled"),
    "scaling.algo": ("current", "most_recent", "exp_smooth", "max"),
    "scaling.tick": ("step", "call"),
    "scaling.sync": ("max", "none"),
    "budget.arithmetic": ("auto", "bf16", "fp32"),
    "logger.name": ("wandb", "local"),
    "logger.mode": ("offline", "online", "disabled"),
    "benchmark.split": ("test", "validation"),
}


class UserError(Exception):
    """Something the user can mend. The message is one line that says what is wrong and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


@dataclass
class ModelConfig:
    name: str = MISSING
    source: str = MISSING  # package: a GGUF inside a PyPI package; hub: a folder or hub id; random: untrained
    path: str | None = None
    revision: str | None = None
    blocks: int | None = None  # transformer blocks; null: known only once the model is loaded
    architecture: dict[str, Any] | None = None  # source=random: keyword arguments of LlamaConfig
    licence: str = "unknown"


@dataclass
class DataConfig:
    name: str = MISSING
    source: str = MISSING
    path: str | None = None  # hub: the data set's id; files: a folder of .txt, one document a file
    subset: str | None = None
    label_shift: str = "once"
    duplicate_workers: int = 1  # every micro-batch occurs this often in a row (the released loader: 2)
    tokenizer_threads: int = 1
    shuffle_buffer: int = 10_000  # documents; streamed sources only


@dataclass
class OptimConfig:
    lr: float = MISSING
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    lr_warmup: float = 0.03  # share of the steps
    master_weights: bool = True  # false: parameters and Adam moments live in BF16


@dataclass
class QuantConfig:
    format: str = MISSING
    scope: list[str] = field(default_factory=lambda: ["mlp.*"])  # linears of a block, with * and ?
    bf16_blocks: int = 5  # the first ceil(n/2) and the last floor(n/2) blocks keep BF16
    weights: bool = True
    activations: bool = True
    gradients: bool = True
    target_activation: float = 15.0
    target_weight: float = 15.0
    target_gradient: float = 15.0
    overflow: str = "clip"
    ste: str = "pass_through"
    operands: str = "exact"


@dataclass
class ScalingConfig:
    algo: str = MISSING
    window: int = 1  # entries of the amax history
    alpha: float = 0.5  # exp_smooth: weight of the newest amax
    tick: str = "step"
    sync: str = "max"
    update_every: int = 1  # ticks between two changes of a scale
    settle: float = 0.0  # share of the steps run as most_recent with an update a tick, before `algo` takes over
    observe_in_warmup: bool = True
    discard_after_warmup: bool = True


@dataclass
class WarmupConfig:
    bf16: float = 0.0  # share of the steps before quantization starts


@dataclass
class BudgetConfig:
    name: str = MISSING
    steps: int = MISSING
    micro_batch: int = MISSING  # sequences a forward call
    accumulation: int = MISSING  # forward calls an optimizer step
    seq_len: int = MISSING  # tokens a sequence
    steps_factor: float = 1.0  # an experiment's own share of the budget (exp2: half the steps ...)
    batch_factor: float = 1.0  # (... at a quarter of the batch)
    arithmetic: str = "auto"  # auto: BF16 where the processor has it, else FP32
    checkpoint_every: int = 100  # steps
    telemetry_every: int = 10  # steps
    heldout_tokens: int = 2048  # tokens of text never trained on, for held-out loss and KL divergence


@dataclass
class TaskConfig:
    shots: int = 0
    limit: int | None = None  # questions (MMLU: of each of the 57 subjects); null: all


@dataclass
class BenchmarkConfig:
    name: str = MISSING
    batch_size: int = 8
    split: str = "test"
    tasks: dict[str, TaskConfig] = field(default_factory=dict)


@dataclass
class LoggerConfig:
    name: str = MISSING
    mode: str = "offline"
    project: str = "hif8-qat"


@dataclass
class ReportConfig:
    experiments: list[str] = field(default_factory=lambda: [f"exp{i}" for i in range(1, 9)])
    out: str = "report"


@dataclass
class Config:
    experiment: str | None = None
    protocol: str = "paper"
    seed: int = 0
    runs_dir: str = "runs"
    run: str | None = None  # eval.py: a run folder, instead of the words that describe it
    report: ReportConfig = field(default_factory=ReportConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    # What a run's length and batch come to; every other module asks here.
    @property
    def steps(self) -> int:
        """Optimizer steps of this run."""
        return max(1, round(self.budget.steps * self.budget.steps_factor))

    @property
    def batch(self) -> tuple[int, int]:
        """(micro_batch, accumulation): sequences a forward call, forward calls a step."""
        sequences = round(self.budget.micro_batch * self.budget.accumulation * self.budget.batch_factor)
        micro = min(self.budget.micro_batch, sequences)
        return micro, sequences // micro

    @property
    def bf16_warmup_steps(self) -> int:
        """Steps before quantization starts (paper: 500 of 10,000)."""
        return _share(self.warmup.bf16, self.steps)

    @property
    def lr_warmup_steps(self) -> int:
        return _share(self.optim.lr_warmup, self.steps)

    @property
    def quantized(self) -> bool:
        return self.quant.format != "none"


def _share(share: float, steps: int) -> int:
    return max(1, round(share * steps)) if share > 0 else 0


def register() -> None:
    """Make the schema known to Hydra under the name `schema`."""
    ConfigStore.instance().store(name="schema", node=Config)


def nearest(value: str, choices) -> str:
    """The choice spelled most like `value`, or all of them when none is close."""
    close = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(choices)}"


def validate(cfg: Config) -> None:
    """Raise `ConfigError` for values and combinations that the types allow and a run does not."""
    for key, choices in CHOICES.items():
        value = attrgetter(key)(cfg)
        if value not in choices:
            raise ConfigError(f"{key}={value}: unknown value; {nearest(value, choices)}")
    for key, low, high in _RANGES:
        value = attrgetter(key)(cfg)
        if not low <= value <= high:
            bound = low if value < low else high
            raise ConfigError(f"{key}={value}: must lie in [{low}, {high}]; the nearest valid value is {bound}")
    for check in (_check_batch, _check_warmup, _check_quant, _check_sources, _check_benchmark):
        check(cfg)


_INF = float("inf")
_RANGES = [
    ("seed", 0, 2**31 - 1),
    ("data.duplicate_workers", 1, 64),
    ("data.tokenizer_threads", 1, 256),
    ("budget.heldout_tokens", 1, _INF),
    ("data.shuffle_buffer", 1, _INF),
    ("optim.lr", 1e-12, 10),
    ("optim.beta1", 0, 0.9999),
    ("optim.beta2", 0, 0.99999),
    ("optim.eps", 1e-30, 1),
    ("optim.weight_decay", 0, 10),
    ("optim.clip", 1e-12, _INF),
    ("optim.lr_warmup", 0, 1),
    ("quant.bf16_blocks", 0, _INF),
    ("quant.target_activation", 2**-22, 57344),
    ("quant.target_weight", 2**-22, 57344),
    ("quant.target_gradient", 2**-22, 57344),
    ("scaling.window", 1, 65536),
    ("scaling.alpha", 0, 1),
    ("scaling.update_every", 1, _INF),
    ("scaling.settle", 0, 1),
    ("warmup.bf16", 0, 1),
    ("budget.steps", 1, _INF),
    ("budget.micro_batch", 1, _INF),
    ("budget.accumulation", 1, _INF),
    ("budget.seq_len", 4, _INF),
    ("budget.steps_factor", 1e-6, 1),
    ("budget.batch_factor", 1e-6, 1),
    ("budget.checkpoint_every", 1, _INF),
    ("budget.telemetry_every", 1, _INF),
    ("benchmark.batch_size", 1, _INF),
]


def _check_batch(cfg: Config) -> None:
    b, factor = cfg.budget, Fraction(cfg.budget.batch_factor).limit_denominator(10**6)

    def fits(accumulation: int) -> bool:
        sequences = b.micro_batch * accumulation * factor
        return sequences % 1 == 0 and (sequences <= b.micro_batch or sequences % b.micro_batch == 0)

    if not fits(b.accumulation):
        valid = filter(fits, range(1, b.accumulation + factor.denominator + 1))
        raise ConfigError(
            f"budget.accumulation={b.accumulation}: times batch_factor={factor} is no whole number of calls of equal "
            f"size; the nearest valid value is {min(valid, key=lambda each: abs(each - b.accumulation))}"
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


# Largest finite value of each format: a target above it could never be reached.
_LARGEST = {"hif8": 32768, "fp8_e4m3": 448, "fp8_e5m2": 57344}


def _check_quant(cfg: Config) -> None:
    if not cfg.quantized:
        return
    q, blocks = cfg.quant, cfg.model.blocks
    if blocks is not None and q.bf16_blocks >= blocks:
        raise ConfigError(
            f"quant.bf16_blocks={q.bf16_blocks}: {cfg.model.name} has {blocks} blocks, so nothing would be quantized; "
            f"the largest valid value is {blocks - 1}"
        )
    if not q.scope:
        raise ConfigError(
            "quant.scope=[]: nothing would be quantized; name linears as in [mlp.down_proj], or use quant=bf16"
        )
    if not (q.weights or q.activations or q.gradients):
        raise ConfigError(
            "quant.weights=false: activations and gradients are off too; switch one on, or use quant=bf16"
        )
    for role in ROLES:
        target = getattr(q, f"target_{role}")
        if target > _LARGEST[q.format]:
            raise ConfigError(
                f"quant.target_{role}={target:g}: above the largest {q.format} value; the nearest valid value is "
                f"{_LARGEST[q.format]}"
            )
    if cfg.scaling.algo == "exp_smooth" and cfg.scaling.window < 2:
        raise ConfigError(
            f"scaling.window={cfg.scaling.window}: exp_smooth averages two entries; the smallest valid value is 2"
        )


def _check_sources(cfg: Config) -> None:
    if cfg.model.source != "random" and not cfg.model.path:
        raise ConfigError(
            f"model.path=null: model.source={cfg.model.source} needs one, as in model.path=HuggingFaceTB/SmolLM2-135M"
        )
    if cfg.model.source == "random" and not cfg.model.architecture:
        raise ConfigError("model.architecture=null: model.source=random needs sizes, as in model=tiny")
    if not cfg.data.path:
        raise ConfigError(f"data.path=null: data.source={cfg.data.source} needs a path, as in data=fineweb")


def _check_benchmark(cfg: Config) -> None:
    for name, task in cfg.benchmark.tasks.items():
        for key, value, low in (("shots", task.shots, 0), ("limit", task.limit, 1)):
            if value is not None and value < low:
                raise ConfigError(f"benchmark.tasks.{name}.{key}={value}: the nearest valid value is {low}")
