"""Try in seconds, before a step is paid for, what training, evaluation, report and export will need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from qat.config import Config, DataConfig, ModelConfig
from qat.data import heldout, packing
from qat.errors import ConfigError, UserError
from qat.eval import benchmarks
from qat.models.load import check_model, context_length
from qat.quant.convert import convert
from qat.quant.kernels import dispatch
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.utils import device, distributed, environment, files

_SECONDS = 60  # after which a compiler does not answer


def check(cfg: Config) -> None:
    """Raise `ConfigError` for the first of `problems`, on every rank; the first alone looks for them."""
    lines = distributed.broadcast_object(problems(cfg) if environment.is_main_process() else [])
    if lines:
        raise ConfigError(lines[0])


def problems(cfg: Config, planning: bool = False) -> list[str]:
    """Return what would stop the run of `cfg` or its evaluation, a line each, tried on the real model, tokenizer, text
    and questions. Texts of a hub are left to the run, which reads them before its first step. planning: nothing is
    loaded from a hub or prepared, and of the disk a plan says more (`qat.tools.plan.plan`)."""
    lines = []

    def attempt(work, *arguments):
        try:
            return work(*arguments)
        except (UserError, OSError) as error:  # else the other ranks would wait for what was found
            lines.append(str(error))

    built = None if planning and from_hub(cfg.model) else attempt(_model, cfg)
    if built is not None:
        model, tokenizer = built
        attempt(_texts, cfg, tokenizer, planning)
        limit = context_length(model.config)
        attempt(benchmarks.check, cfg.benchmark, tokenizer, limit)
        if not planning:
            attempt(_disk, cfg, sum(parameter.numel() for parameter in model.parameters()))
    attempt(_compilers, cfg)
    return lines


def from_hub(source: ModelConfig | DataConfig) -> bool:
    """Return whether a model or text is read from a hub and not from a folder."""
    return source.source == "hub" and not Path(files.expand(source.path)).is_dir()


def _model(cfg: Config):
    """Return (the converted model without weights, its tokenizer). Errors: UserError."""
    model, tokenizer = check_model(cfg.model, max(cfg.budget.seq_len, heldout.HELDOUT_LENGTH))
    convert(model, cfg)
    return model, tokenizer


def _texts(cfg: Config, tokenizer, planning: bool) -> None:
    """Read a sequence of each text that is here. Errors: UserError."""
    here = [text for text in (cfg.data, cfg.validation) if text is not None and not from_hub(text)]
    for text in (text for text in here if not planning or text.source != "prepared" or text.revision):
        heldout.load_heldout(text, tokenizer, heldout.HELDOUT_LENGTH)
        if text is cfg.data:
            packing.training_stream(text, cfg.seed, tokenizer).micro_batch(1, cfg.budget.seq_len)


def checkpoint_bytes(cfg: Config, parameters: int) -> tuple[int, int]:
    """Return (most, final) bytes of a run's checkpoints: weights and moments of two that are kept and one that is being
    written, as far as there are so many; only weights when it is finished."""
    weights, moments = cfg.optim.weight_bytes * parameters, cfg.optim.moment_bytes * parameters
    saved = min(3, (cfg.steps - 1) // cfg.budget.checkpoint_every)
    return max(weights, saved * (weights + moments)), weights


def _disk(cfg: Config, parameters: int) -> None:
    """Raise `UserError` where the checkpoints of the run and its baseline have no room."""
    runs = {run.id: run for run in map(Run.of, (baseline_of(cfg), cfg)) if not run.finished}
    most, final = checkpoint_bytes(cfg, parameters)
    there = sum(file.stat().st_size for run in runs.values() for file in run.checkpoints.rglob("*.safetensors"))
    _check_free(cfg, "the checkpoints", most + final * (len(runs) - 1) - there)


def check_room(configs: Sequence[Config]) -> None:
    """Raise `UserError` where the weights of many runs, which are kept when they are finished, have no room."""
    configs = list({run_id(cfg): cfg for cfg in configs if not Run.of(cfg).finished}.values())
    if len(configs) <= 2:  # `check` asks for a run and its baseline
        return
    model, _ = check_model(configs[0].model, configs[0].budget.seq_len)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    need = sum(checkpoint_bytes(cfg, parameters)[1] for cfg in configs)
    _check_free(configs[0], f"the weights of {len(configs)} runs", need)


def _check_free(cfg: Config, what: str, need: int) -> None:
    """Raise `UserError` where fewer bytes than `need` are free for the runs of `cfg`."""
    free = shutil.disk_usage(files.existing(Path(cfg.runs_dir))).free
    if need > free:
        raise UserError(
            f"runs_dir={cfg.runs_dir}: {what} take {need / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; make room, "
            f"or name a folder on another disk"
        )


def _compilers(cfg: Config) -> None:
    """Have something rounded by the kernels of this machine and, with budget.compile, something compiled by what
    PyTorch calls. Errors: UserError."""
    q = cfg.quant
    if cfg.quantized:
        x = torch.ones(1, device=device.get_device())
        dispatch.quantize(x, x[0], None, q.format, q.overflow, q.target_activation, "values")
    if not cfg.budget.compile:
        return
    variable, language, usual = ("CC", "c", "gcc") if device.get_device().type == "cuda" else ("CXX", "c++", "g++")
    compiler = os.environ.get(variable) or usual
    command = [compiler, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", language, "-"]
    how = {"input": "#include <Python.h>\n", "capture_output": True, "text": True, "timeout": _SECONDS}
    try:
        subprocess.run(command, check=True, **how)
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        raise UserError(
            f"budget.compile=true: {compiler} does not compile here ({reason}); install a C++ compiler and Python's "
            f"headers, name another in ${variable}, or set budget.compile=false"
        ) from error
