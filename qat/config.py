"""The typed configuration: what a run is made of, and which combinations make sense.

Hydra composes `conf/` onto these dataclasses, so an unknown key or a wrong type is refused while composing;
`qat.cli.validate` refuses what types cannot say. Both end in a `ConfigError` of one line that names the key, the value
and the nearest valid choice, before any model is loaded.

The defaults below are part of every run's name, which leaves them out (`qat.runs.identity.identity`): a new field may
have any default that keeps old runs what they were, and a default never changes afterwards.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

ROLES = ("activation", "weight", "gradient")

GROUPS = ("role", "block", "projection", "linear")  # rounded tensors by role; by block, projection, both, and role

CHOICES = {
    "protocol": ("paper", "released", "vendor"),
    "model.source": ("package", "hub", "random"),
    "data.source": ("package", "hub", "files", "prepared"),
    "data.label_shift": ("once", "twice"),
    "optim.moments": ("fp32", "bf16", "hif8"),
    "quant.overflow": ("clip", "saturate", "inf"),
    "quant.rounding": ("nearest", "hybrid"),
    "quant.ste": ("pass_through", "masked"),
    "quant.operands": ("exact", "descaled"),
    "quant.gemm": ("bf16", "fp8"),
    "scaling.tick": ("step", "call"),
    "scaling.sync": ("max", "none"),
    "budget.parallel": ("ddp", "fsdp"),
    "budget.arithmetic": ("auto", "bf16", "fp32"),
    "logger.name": ("wandb", "local"),
    "logger.mode": ("offline", "online", "disabled"),
    "benchmark.split": ("test", "validation"),
    "benchmark.arithmetic": ("training", "export"),
    "launch.launcher": ("basic", "slurm"),
    "sensitivity.of": ("run", "baseline", "pretrained"),
    "ptq.on": ("baseline", "pretrained"),
}

# What is about commands, and says nothing of a run.
COMMAND_GROUPS = ("report", "launch", "bench", "replay", "ptq", "export", "sensitivity", "dashboard")
COMMAND_KEYS = ("run", "runs", "record", "seeds")

STREAM_ORDER = 2  # version of the rule by which `qat.data.streaming` orders documents; part of a run's name


@dataclass
class ModelConfig:
    name: str = MISSING  # in messages and run ids
    source: str = MISSING  # package: a GGUF inside a PyPI package; hub: a folder or hub id; random: untrained
    path: str | None = None  # a file in a package, a folder, or a hub id
    revision: str | None = None  # hub: branch, tag or commit
    blocks: int | None = None  # transformer blocks; null: known only once the model is loaded
    architecture: dict[str, Any] | None = None  # source=random: keyword arguments of LlamaConfig
    licence: str = "unknown"  # what an exported model says of it


@dataclass
class DataConfig:
    group: ClassVar[str] = "data"  # what its keys begin with
    packaged: ClassVar[str] = "embedded"  # its option that needs nothing but a package
    name: str = MISSING  # in messages and reports
    source: str = MISSING  # where the text comes from
    # hub: the data set's id; files: a folder of .txt, cut into documents of about 4,000 characters, or for `validation`
    # a MediaWiki dump as .bz2 or a file of `datasets` as .arrow; package: any of these inside one; prepared: its name
    path: str | None = None
    subset: str | None = None  # hub: configuration of the data set
    # hub: branch, tag or commit; null: the newest when the run, or its cache, begins. prepared: a hash of the text;
    # null: that of the text in the cache
    revision: str | None = None
    label_shift: str = "once"  # twice: the model learns the token after next, as in the released code
    duplicate_workers: int = 1  # every micro-batch occurs this often in a row (the released loader: 2)
    tokenizer_threads: int = 1  # threads that tokenize
    shuffle_buffer: int = 10_000  # documents that are shuffled together; streamed sources only
    retry_hours: float = 12.0  # how long a hub that cannot be reached is waited for; streamed sources only
    cache: bool = False  # keep tokens on disk, for all runs that read the same text; streamed sources only

    @property
    def named(self) -> str:
        """Its path, for messages."""
        return f"{self.group}.path={self.path}"


@dataclass
class ValidationConfig(DataConfig):
    group: ClassVar[str] = "validation"
    packaged: ClassVar[str] = "wikipedia"
    column: str = "text"  # of an .arrow file: the column that holds the text
    tokens: int | None = None  # of it, for held-out loss and KL; null: half of budget.heldout_tokens


@dataclass
class OptimConfig:
    lr: float = MISSING  # learning rate at its peak
    beta1: float = 0.9  # of AdamW: decay of the mean of gradients
    beta2: float = 0.95  # of AdamW: decay of the mean of their squares
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.1  # of AdamW, on every parameter
    clip: float = 1.0  # largest norm of the gradient
    lr_warmup: float = 0.03  # share of the steps
    lr_from_zero: bool = False  # whether the first step of the warmup has a rate of 0
    max_skipped: int = 10  # steps in a row without a finite gradient, after which the run gives up
    master_weights: bool = True  # false: parameters and FP32 moments hold only what BF16 can
    # the whole model in BF16: residual stream, gradients, their sums and clipping, too; with master_weights=false
    pure_bf16: bool = False
    # of AdamW, in memory and checkpoints: fp32; bf16; hif8 (the mean of gradients in HiF8, that of squares in FP16)
    moments: str = "fp32"

    @property
    def weight_bytes(self) -> int:
        """Bytes that a parameter takes, in memory and checkpoints; so does its gradient."""
        return 2 if self.pure_bf16 else 4

    @property
    def moment_bytes(self) -> int:
        """Bytes a parameter that both moments take; with pure_bf16 they are as the parameter is."""
        return {"fp32": 2 * self.weight_bytes, "bf16": 4, "hif8": 3}[self.moments]


@dataclass
class LossConfig:
    # share of KL(pretrained model || this model), over the vocabulary, in what is minimized; the rest is cross-entropy
    distill: float = 0.0


@dataclass
class QuantConfig:
    format: str = MISSING  # what is rounded to; none: nothing is
    scope: list[str] = field(default_factory=lambda: ["mlp.*"])  # linears of a block, with * and ?
    bf16_blocks: int = 5  # the first ceil(n/2) and the last floor(n/2) blocks keep BF16
    bf16_also: list[int] = field(default_factory=list)  # blocks between these, counted from 0, that keep BF16, too
    weights: bool = True  # whether weights are rounded
    activations: bool = True  # whether inputs of linears are rounded
    gradients: bool = True  # whether gradients of their outputs are rounded
    target_activation: float = 15.0  # what the predicted amax is mapped to
    target_weight: float = 15.0  # the same for weights
    target_gradient: float = 15.0  # the same for gradients
    overflow: str = "clip"  # past the target: clip to it; or past the format's largest value: saturate, or inf
    rounding: str = "nearest"  # of gradients; hybrid: outside 1/8 to 16 by a value's own last bits (HiF8 only)
    ste: str = "pass_through"  # gradients through rounding: all pass, or (masked) none where a value was clipped
    # CAGE: after an update with learning rate lr, w -= lr * lambda * (w - round(w)); this is lambda at the end. 0: off
    cage: float = 0.0
    cage_silent: float = 0.8  # share of the steps during which CAGE's lambda is 0; then it rises linearly
    # exact: multiply, then divide by the scales; descaled: the other way round, as the released code
    operands: str = "exact"
    # bf16: products in the run's arithmetic (`budget.arithmetic`); fp8: HiF8 values as E4M3 bytes on FP8 tensor cores;
    # operands are exact from 2^-12 up, sums are not (docs/performance.md)
    gemm: str = "bf16"


@dataclass
class ScalingConfig:
    algo: str = MISSING  # the scaling rule (`qat.quant.rules`)
    window: int = 1  # entries of the amax history
    alpha: float = 0.5  # exp_smooth: weight of the newest amax
    lr: float = 0.1  # lsq: learning rate of 1 / scale
    tick: str = "step"  # the history advances once a step, or once a forward call
    sync: str = "max"  # max: ranks share their largest amaxes; none: each keeps its own
    update_every: int = 1  # ticks between two changes of a scale
    # headroom in octaves against values that grow while a scale is held: scale = target / (2^guard * amax), as
    # `margin` in Transformer Engine and MindSpeed
    guard: float = 0.0
    settle: float = 0.0  # share of the steps run as most_recent with an update a tick, before `algo` takes over
    observe_in_warmup: bool = True  # whether amaxes are observed before quantization starts
    discard_after_warmup: bool = True  # whether that history is dropped when it starts
    # rules tried beside this one on the same weights and batch, at steps with telemetry, as in [most_recent,max:64]
    shadow: list[str] = field(default_factory=list)


@dataclass
class WarmupConfig:
    bf16: float = 0.0  # share of the steps before quantization starts


@dataclass
class BudgetConfig:
    name: str = MISSING  # in reports
    steps: int = MISSING  # optimizer steps
    micro_batch: int = MISSING  # sequences a forward call
    accumulation: int = MISSING  # forward calls an optimizer step
    seq_len: int = MISSING  # tokens a sequence
    steps_factor: float = 1.0  # an experiment's own share of the budget (exp2: half the steps ...)
    batch_factor: float = 1.0  # (... at a quarter of the batch)
    arithmetic: str = "auto"  # auto: BF16 on GPUs, AMX and Arm's BF16, else FP32
    parallel: str = "ddp"  # under torchrun: ddp, or fsdp (FSDP2: parameters and Adam moments sharded over the ranks)
    compile: bool = False  # torch.compile of the forward and backward pass; needs a C++ compiler on a CPU
    # keep only what enters each block, and compute the rest again for its gradients
    activation_checkpointing: bool = False
    largest_logits: int = 2**28  # elements; steps that are not compiled make more in pieces
    checkpoint_every: int = 100  # between two checkpoints, in steps
    telemetry_every: int = 10  # between two steps whose tensors are looked at, in steps
    heldout_tokens: int = 2048  # of text never trained on, for held-out loss and KL
    validation_tokens: int = 128  # tokens of each text whose loss is looked at during training


@dataclass
class TaskConfig:
    shots: int = 0  # examples in the prompt
    limit: int | None = None  # questions (MMLU: of each of the 57 subjects); null: all


@dataclass
class BenchmarkConfig:
    name: str = MISSING  # under which scores are kept
    batch_size: int = 8  # choices at a time, of a model that cannot encode shared prompts once
    split: str = "test"  # which questions
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # whose questions; none: text alone
    arithmetic: str = "training"  # training: as the model was trained, with FP32 logits; export: BF16 throughout
    control: bool = False  # whether the baseline is also scored with 4-bit weights: a damage that measures must see


@dataclass
class LoggerConfig:
    name: str = MISSING  # wandb: mirrored to Weights & Biases; local: only the run folder
    mode: str = "offline"  # whether W&B is sent anything
    project: str = "hif8-qat"  # of W&B


def experiments() -> list[str]:
    """Return the names of all experiments: the files in conf/experiment, exp2 before exp10."""
    files = (Path(__file__).resolve().parents[1] / "conf" / "experiment").glob("*.yaml")
    return sorted((file.stem for file in files), key=lambda name: (len(name), name))


@dataclass
class ReportConfig:
    experiments: list[str] = field(default_factory=experiments)  # which to make or to show
    out: str = "report"  # folder of the report


@dataclass
class LaunchConfig:
    launcher: str = "basic"  # suite.py: basic (here, one after another) or slurm
    ranks: int = 1  # processes that train a run together, one a GPU; slurm: on each node
    nodes: int = 1  # slurm: machines that train a run together
    sbatch: str = ""  # slurm: further options of sbatch, as in --partition=gpu --account=lab


@dataclass
class BenchConfig:
    rounds: int = 5  # times that everything is measured, in turn
    # what; also products, which needs mmaemu: how exact the products of quant.gemm=fp8 are
    parts: list[str] = field(default_factory=lambda: ["kernels", "steps", "memory", "questions"])
    steps: list[str] | None = None  # which of `qat.tools.bench.steps`, beside bf16; null: all that can run
    out: str = "bench"  # folder of the table


@dataclass
class ReplayConfig:
    # to try on the amaxes of a run, as in max:64, exp_smooth:0.3, max:64/10 (held for 10 ticks) or max:64+1 (guard)
    rules: list[str] = field(
        default_factory=lambda: ["most_recent", "exp_smooth", "max:4", "max:16", "max:64", "max:64/10"]
    )
    tensor: str | None = None  # whose amaxes are drawn; null: of the one that exceeds its prediction most


_METHODS = ["max", "cast", "quantile", "ofmr", "mse", "smoothquant:0.5", "awq", "gptq", "per_channel", "llm_int8:6"]
_METHODS += ["rotation"]
_FORMATS = ["fp8_e4m3", "fp8_e5m2", "int8", "mxfp8"]


@dataclass
class PTQConfig:
    on: str = "baseline"  # whose weights: of the matched BF16 baseline, or of the pretrained model, without training
    # rows: methods of `qat.quant.ptq`, with a number where they take one, and other formats, which max calibrates
    rungs: list[str] = field(default_factory=lambda: [*_METHODS, *_FORMATS])
    # which of them also answer the benchmark's questions, which takes longest; of the others only the loss is taken
    questions: list[str] = field(default_factory=lambda: ["max"])
    sequences: int | None = None  # of the first training text, which calibrate; null: 16, as everywhere
    tokens: int | None = None  # of each of them; null: budget.seq_len


@dataclass
class ExportConfig:
    out: str | None = None  # null: <run folder>/export


@dataclass
class SensitivityConfig:
    of: str = "run"  # whose damage: the run's; or of its baseline or the pretrained checkpoint, by PTQ
    groups: list[str] = field(default_factory=lambda: list(GROUPS))  # which sets of rounded tensors
    tokens: int = 896  # of each held-out text; on as many more the choice of blocks is checked
    task: str = "mmlu"  # whose questions
    questions: int = 1  # of it (MMLU: of each of the 57 subjects); 0: none


@dataclass
class DashboardConfig:
    out: str | None = None  # a file for the workspace's specification, instead of saving it in W&B


@dataclass
class Config:
    experiment: str | None = None  # the experiment it belongs to: a file of conf/experiment/
    protocol: str = "paper"  # the paper's text, what its released code did, or how the format's vendor trains
    seed: int = 0  # of the order of the text, and of random weights
    seeds: list[int] | None = None  # several in its place: suite.py, the studies, report.py, record.py
    repeat: int = 0  # above 0: the same run once more, to see what the machine alone changes
    runs_dir: str = "runs"  # where run folders are
    retrain: bool = False  # train.py: train a finished run again whose checkpoint is gone, as of a restored record
    run: str | None = None  # eval.py, export.py, sensitivity.py, dashboard.py: a run folder, instead of its overrides
    runs: list[str] | None = None  # report.py, diff.py, replay.py: run folders, instead of the experiments
    record: str | None = None  # record.py, restore.py, verify.py: the folder of a record
    report: ReportConfig = field(default_factory=ReportConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    ptq: PTQConfig = field(default_factory=PTQConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    dashboard: DashboardConfig = field(default_factory=DashboardConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig | None = None  # text of another kind: its loss rises when a model forgets
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
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
    def size(self) -> str:
        """Steps and batch in words."""
        micro, accumulation = self.batch
        return f"{self.steps:,} steps of {micro * accumulation} × {self.budget.seq_len} tokens"

    @property
    def variations(self) -> list[str]:
        """Name in words what it trains by instead of the defaults: estimator, loss, moments."""
        words = {
            "masked straight-through": self.quant.ste == "masked",
            f"CAGE {self.quant.cage:g}": self.quant.cage,
            f"distillation {self.loss.distill:g}": self.loss.distill,
            f"Adam moments in {self.optim.moments}": self.optim.moments != "fp32",
        }
        return [text for text, holds in words.items() if holds]

    @property
    def batch(self) -> tuple[int, int]:
        """(micro_batch, accumulation): sequences a forward call, forward calls a step."""
        sequences = round(self.budget.micro_batch * self.budget.accumulation * self.budget.batch_factor)
        micro = min(self.budget.micro_batch, sequences)
        return micro, sequences // micro

    def calls(self, accumulation: int) -> int | None:
        """Forward calls a step with another `budget.accumulation`; None where they would not be whole and equal."""
        micro = self.budget.micro_batch
        sequences = micro * accumulation * self.batch_factor
        if sequences % 1 or (sequences > micro and sequences % micro):
            return None
        return max(1, int(sequences) // micro)

    def nearest_accumulation(self, ranks: int = 1) -> int:
        """The `budget.accumulation` nearest to this one whose calls so many ranks can share evenly."""
        wanted, factor, micro = self.budget.accumulation, self.batch_factor, self.budget.micro_batch
        # Multiples of a unit are valid, at most up to a limit: whole calls, or on one rank a part of a call.
        whole = factor.denominator * (ranks // math.gcd(ranks, factor.numerator))
        units = [(whole, wanted + whole)]
        units += [(factor.denominator // math.gcd(factor.denominator, micro), int(1 / factor))] if ranks == 1 else []
        near = [n for unit, most in units for n in range(min(wanted, most) // unit * unit, most + 1, unit)[:2] if n]
        return min(near, key=lambda n: (abs(n - wanted), -n))

    @property
    def batch_factor(self) -> Fraction:
        """`budget.batch_factor` without what a float adds to it."""
        return Fraction(self.budget.batch_factor).limit_denominator(10**6)

    @property
    def bf16_warmup_steps(self) -> int:
        """Steps before quantization starts (paper: 500 of 10,000)."""
        return _share(self.warmup.bf16, self.steps)

    @property
    def lr_warmup_steps(self) -> int:
        return _share(self.optim.lr_warmup, self.steps)

    @property
    def settle_steps(self) -> int:
        """Steps run as most_recent before `scaling.algo` takes over."""
        return _share(self.scaling.settle, self.steps)

    @property
    def cage_silent_steps(self) -> int:
        """Steps before CAGE begins to draw weights to their rounded values."""
        return _share(self.quant.cage_silent, self.steps)

    @property
    def quantized(self) -> bool:
        return self.quant.format != "none"


def _share(share: float, steps: int) -> int:
    return max(1, round(share * steps)) if share > 0 else 0


def register() -> None:
    """Make the schema known to Hydra under the name `schema`."""
    ConfigStore.instance().store(name="schema", node=Config)


# What conf/ computes with. Known to any process that imports this, as a launcher's workers do.
OmegaConf.register_new_resolver("last_part", lambda path: PurePath(path or "hub").name, replace=True)
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
