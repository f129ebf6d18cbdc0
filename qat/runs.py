"""A run is a folder. Its name is a readable slug and a hash of everything that can change a number.

runs/<id>/  config.yaml  environment.json  status.json  metrics.jsonl  telemetry.jsonl
            warnings.jsonl  coverage.json  eval.json  samples/  comparison.json  checkpoints/  wandb/
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat import files, ranks, runtime, scaling
from qat.config import STREAM_ORDER, Config, QuantConfig, ScalingConfig, UserError, WarmupConfig
from qat.validate import validate

# Of these groups, what cannot change a number of training.
_IRRELEVANT = {
    "model": ("name", "licence", "blocks"),
    "data": ("name", "tokenizer_threads", "retry_hours", "cache"),
    "optim": (),
}
_OF_TRAINING = ("gradients", "target_gradient", "ste")  # of `quant`, what a forward pass does not know of


def identity(cfg: Config) -> dict:
    """Everything in a configuration that can change a number of training, and nothing else."""
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
        "arithmetic": runtime.arithmetic(cfg.budget.arithmetic),
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
    """The fields of a configuration group that differ from their defaults, so that an option added later renames no
    run of before."""
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(group)
    }
    return {name: value for name, value in dataclasses.asdict(group).items() if value != defaults[name]}


def _effective_scaling(cfg: Config) -> dict:
    """The scaling without what it never looks at: the options of other rules, and without a BF16 warmup whether its
    history is kept or discarded."""
    ignored = {"window", "alpha"} - set(scaling.options(cfg.scaling))
    if not cfg.bf16_warmup_steps:
        ignored |= {"observe_in_warmup", "discard_after_warmup"}
    return {name: value for name, value in _chosen(cfg.scaling).items() if name not in ignored}


def baseline_of(cfg: Config) -> Config:
    """The matched BF16 baseline: the same configuration in everything but quantization."""
    baseline = copy.deepcopy(cfg)
    baseline.quant = QuantConfig(format="none")
    baseline.scaling = ScalingConfig(algo="current")
    baseline.warmup = WarmupConfig()
    return baseline


def untouched_of(cfg: Config) -> Config:
    """The checkpoint before any training, as a configuration to score: a baseline of no steps."""
    untouched = baseline_of(cfg)
    untouched.budget.steps = 0
    return untouched


def is_ptq(mode: str) -> bool:
    """Whether an evaluation's mode is one of `ptq_mode`."""
    return mode.startswith("ptq-")


def ptq_mode(quant: QuantConfig) -> str:
    """Under which name a baseline's folder keeps the scores of its weights under a quantization: all runs that quantize
    the forward pass alike share them."""
    parts = {name: value for name, value in _chosen(quant).items() if name not in _OF_TRAINING}
    return f"ptq-{_digest(parts)}"


def run_id(cfg: Config) -> str:
    """Readable slug plus a hash of `identity`. Characters: letters, digits, '.', '_', '-'."""
    if cfg.budget.steps == 0:
        parts, slug = _untouched_identity(cfg), [cfg.model.name, "untouched"]
    else:
        parts, slug = identity(cfg), [cfg.model.name, *_slug(cfg)]
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in "-".join(slug))
    return f"{safe[:80]}-{_digest(parts)}"


def _digest(parts: dict | list) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def _untouched_identity(cfg: Config) -> dict:
    whole = identity(cfg)
    return {"model": whole["model"], "arithmetic": whole["budget"]["arithmetic"]} | (
        {"seed": cfg.seed} if cfg.model.source == "random" else {}
    )


def _slug(cfg: Config) -> list[str]:
    words = ["bf16"]
    if cfg.quantized:
        words = [cfg.quant.format, cfg.scaling.algo]
        words += [f"w{cfg.scaling.window}"] if "window" in scaling.options(cfg.scaling) else []
        words += [f"warm{cfg.bf16_warmup_steps}"]
    words += ["twice"] if cfg.data.label_shift == "twice" else []
    repeat = [f"r{cfg.repeat}"] if cfg.repeat else []
    return [*words, f"lr{cfg.optim.lr:g}", f"{cfg.steps}steps", f"s{cfg.seed}", *repeat]


@contextlib.contextmanager
def _readable(path: Path):
    """Turn whatever a damaged file makes its parser raise into one line that names the file."""
    try:
        yield
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0].strip()
        raise UserError(f"{path} is damaged ({reason}); delete the run folder to make it again") from error


def config_of(folder: str) -> Config:
    """The configuration of a run folder that the user names, with runs_dir where that folder is now. Errors: UserError
    when it is no run folder, or not the one of its configuration."""
    run = Run(Path(folder).absolute())
    cfg = run.typed_config()
    cfg.runs_dir = str(run.path.parent)
    if cfg.budget.steps:  # the untouched checkpoint has none
        validate(cfg)
    if run.id != run_id(cfg):
        raise UserError(f"run={folder}: its config.yaml is of {run_id(cfg)}; give the folder that name again")
    return cfg


@functools.lru_cache(1024)  # a report asks for each configuration many times, and a tenth of a second adds up
def _parsed(text: str) -> dict:
    return _mapping(OmegaConf.to_container(OmegaConf.create(text)))


@functools.lru_cache(1024)
def _typed(text: str) -> Config:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), _parsed(text)))


def _mapping(content, *required: str) -> dict:
    if not isinstance(content, dict):
        raise ValueError(f"a mapping was expected, not {type(content).__name__}")
    for key in required:
        if key not in content:
            raise ValueError(f"'{key}' is missing")
    return content


def _json_lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class Run:
    """Reads and writes one run folder. Readers return what is there; a missing file reads as empty."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @classmethod
    def of(cls, cfg: Config) -> Run:
        """The folder that belongs to a configuration, whether it exists or not."""
        return (cls if ranks.first() else Onlooker)(Path(cfg.runs_dir) / run_id(cfg))

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return self.status().get("state") == "finished"

    # Reading --------------------------------------------------------------------------------------------------

    def config(self) -> dict:
        path = self.path / "config.yaml"
        with _readable(path):
            if not path.exists():
                return {}
            return copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))

    def typed_config(self) -> Config:
        """The configuration as `Config`. Errors: UserError when the folder is not a run of this version."""
        if not (self.path / "config.yaml").exists():
            raise UserError(f"run={self.path}: not a run folder (no config.yaml); see `ls {self.path.parent}`")
        with _readable(self.path / "config.yaml"):
            return copy.deepcopy(_typed((self.path / "config.yaml").read_text(encoding="utf-8")))

    @property
    def fingerprint(self) -> str:
        """A hash of its training losses and batches: trained again with the same one, it has the same weights."""
        return _digest([(row.get("loss"), row.get("batch")) for row in self.metrics()])

    def status(self) -> dict:
        return self._json("status.json", "state", "step", "steps")

    def environment(self) -> dict:
        """That of the process that worked on it last."""
        return self._json("environment.json")

    def environments(self) -> list[dict]:
        """Those of all processes that worked on it, the last one's last."""
        last = self.environment()
        return [*last.get("earlier", []), last] if last else []

    def evaluations(self) -> dict:
        evaluations = self._json("eval.json")
        with _readable(self.path / "eval.json"):
            for modes in evaluations.values():
                for record in _mapping(modes).values():
                    _mapping(record)
        return evaluations

    def comparison(self) -> dict:
        return self._json("comparison.json")

    def coverage(self) -> dict:
        return self._json("coverage.json")

    def metrics(self) -> list[dict]:
        return self._lines(self.path / "metrics.jsonl", "step")

    def telemetry(self) -> list[dict]:
        return self._lines(self.path / "telemetry.jsonl", "step")

    def warnings(self) -> list[dict]:
        return self._lines(self.path / "warnings.jsonl", "step")

    def samples(self, benchmark: str, mode: str, task: str) -> list[dict]:
        return self._lines(self.path / "samples" / benchmark / mode / f"{task}.jsonl")

    def _json(self, name: str, *required: str) -> dict:
        path = self.path / name
        with _readable(path):
            return _mapping(json.loads(path.read_text(encoding="utf-8")), *required) if path.exists() else {}

    @staticmethod
    def _lines(path: Path, *required: str) -> list[dict]:
        if not path.exists():
            return []
        with _readable(path):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line without its end was cut off by a kill; the resume writes it again.
            return [_mapping(json.loads(line), *required) for line in lines if line.endswith("\n")]

    # Writing --------------------------------------------------------------------------------------------------

    def create(self, cfg: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.yaml").exists():
            self._replace("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg)))
        now, before = runtime.environment(), self.environment()
        earlier = before.pop("earlier", [])
        if before and before != now:  # resumed elsewhere, or by another version or command
            earlier.append(runtime.brief(before))
        self.write_json("environment.json", now | ({"earlier": earlier} if earlier else {}))

    def write_json(self, name: str, content: dict) -> None:
        self._replace(name, json.dumps(content, indent=1))

    def set_status(self, state: str, step: int, steps: int, **more) -> None:
        self.write_json("status.json", {"state": state, "step": step, "steps": steps, **more})

    def write_samples(self, benchmark: str, mode: str, task: str, rows: list[dict]) -> None:
        name = Path("samples") / benchmark / mode / f"{task}.jsonl"
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        self._replace(name, _json_lines(rows))

    @contextlib.contextmanager
    def append(self, name: str):
        """A function that appends rows to a JSON-lines file and hands them to the system at once."""
        path = self.path / name
        file = path.open("a", encoding="utf-8")

        def write(rows: list[dict]) -> None:
            with files.naming(path):
                file.write(_json_lines(rows))
                file.flush()

        try:
            yield write
        finally:
            with files.naming(path):  # what a full disk did not take is tried once more
                file.close()

    def keep_rows(self, name: str, last_step: int) -> None:
        """Drop the rows of steps after `last_step`: a resumed run writes them again."""
        rows = self._lines(self.path / name, "step")
        self._replace(name, _json_lines(row for row in rows if row["step"] <= last_step))

    def _replace(self, name: str | Path, text: str) -> None:
        files.replace(self.path / name, text)

    def lock(self):
        """Hold the folder for writing, as a context. Jobs of a sweep that run side by side share their baseline, so
        another process may hold it, and is waited for."""
        return files.lock(self.path, self.id)


class Onlooker(Run):
    """A run folder as ranks other than the first see it: they read it and never write."""

    def create(self, cfg: Config) -> None: ...

    def _replace(self, name: str | Path, text: str) -> None: ...

    @contextlib.contextmanager
    def append(self, name: str):
        yield lambda rows: None

    @contextlib.contextmanager
    def lock(self):
        yield
