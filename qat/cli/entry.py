"""Command-line entries: Hydra composes, we validate, and what the user can mend ends in one line and exit code 2."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.cli import sweep
from qat.cli.outcomes import explain_error
from qat.cli.validate import validate, validate_ranks, validate_surroundings
from qat.config import COMMAND_GROUPS, COMMAND_KEYS, Config, ValidationConfig, register
from qat.data import manuals
from qat.errors import ConfigError, UserError, nearest
from qat.runs.folder import Run
from qat.runs.identity import run_id
from qat.utils import environment, files, signals
from qat.utils.environment import ROOT

CONF = str(ROOT / "conf")


def run(work: Callable[[Config, DictConfig], None], takes: tuple[str, ...] = (), reads_text: bool = False) -> None:
    """Run `work` on each composed configuration of `conf/train.yaml`, as a script's main function.

    takes: the keys and groups of commands that the script takes (`qat.config.COMMAND_KEYS`, `COMMAND_GROUPS`).
    reads_text: prepare it first where it is missing, for runs are named by it.
    In a sweep a failing job neither stops nor hides the others: a table at the end has them all (`qat.cli.sweep`).
    Exit codes: 2 for what the user can mend, 75 after a scheduler's stop, 130 after Ctrl-C.
    """
    register()
    # Hydra prints its own multi-line account of an error unless it is told to raise; we say it in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sweep.Sweep.folder = None
    began = []

    def job(cfg: DictConfig) -> None:
        began.append(cfg)
        try:
            with signals.raise_on_signal():
                sweep.run(lambda: _mendable(work, cfg, takes, reads_text))
        except UserError as error:  # of a single run; Hydra would say more if it saw it
            _say(error)
            sys.exit(2)

    try:
        validate_ranks(os.environ)
    except ConfigError as error:  # said by every process: which rank it is, is what is wrong
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    code, line = _compose_and_do(job, began)
    failed = sweep.report() if environment.is_main_process() else 0
    if line and environment.is_main_process():
        print(line, file=sys.stderr)
    if code or failed:
        sys.exit(code or failed)


def _say(error: UserError) -> None:
    """Print an error of a run. Of a bad configuration every rank knows, so the first one says it; anything else may be
    one rank's alone."""
    if environment.is_main_process():
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, ConfigError):
        print(f"rank {environment.rank()}: error: {error}", file=sys.stderr)


def _compose_and_do(job: Callable[[DictConfig], None], began: list) -> tuple[int, str | None]:
    """Let Hydra compose and do `job`, which adds to `began` when it begins. Returns the exit code and the last line."""
    try:
        with signals.raise_on_signal():
            validate_surroundings(sys.argv[1:], os.environ)
            hydra.main(version_base="1.3", config_path=CONF, config_name="train")(job)()
    except ConfigError as error:
        return 2, f"error: {error}"
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RuntimeError) as error:
        if began:  # not Hydra's, nor a launcher's: a defect of ours, to be seen whole
            raise
        return 2, f"error: {explain_error(error)}"
    except signals.Preempted as stop:
        return signals.REQUEUE, f"\n{stop}: saved; the same command continues"
    except KeyboardInterrupt:
        return 130, "\nstopped; the same command continues from the last checkpoint"
    return 0, None


def _mendable(
    work: Callable[[Config, DictConfig], None], cfg: DictConfig, takes: tuple[str, ...], reads_text: bool
) -> None:
    """Do `work`, again after a stop that did not end the process. Errors: UserError for all that the user can mend."""
    try:
        while True:
            try:
                return work(_accepted(typed_config(cfg, reads_text), takes), cfg)
            except signals.Preempted as stop:
                signals.forward(stop)
    # Also of another experiment, composed on the way.
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise UserError(explain_error(error)) from error


_FIXES = {  # of a key of commands that a script does not take; of any other, to leave it out
    **dict.fromkeys(("run", "runs", "record"), "give it the overrides that made a run"),
    "seeds": "give it one seed, as in seed=1",
}


def _accepted(config: Config, takes: tuple[str, ...]) -> Config:
    usual = Config()
    of_groups = [f"{group}.{key}" for group in COMMAND_GROUPS for key in vars(getattr(usual, group))]
    for key in (*COMMAND_KEYS, *of_groups):
        value = attrgetter(key)(config)
        if value != attrgetter(key)(usual) and not {key, key.partition(".")[0]} & set(takes):
            fix = _FIXES.get(key, "leave it out")
            raise ConfigError(f"{key}={value}: {Path(sys.argv[0]).name} does not take it; {fix}")
    return config


def overrides() -> list[str]:
    """Return the overrides on the command line."""
    return list(HydraConfig.get().overrides.task)


def path_of(override: str) -> list[str]:
    """Return the parts of the key of a command-line override."""
    return re.match(r"[+~]*([\w.]*)", override)[1].split(".")


def beside(key: str, *groups: str) -> list[list[str]]:
    """Return the keys on the command line beside `key`, all of them of `groups`, outer ones first (`path_of`).

    Errors: ConfigError for any other, which would have no effect.
    """
    paths = []
    for override in overrides():
        path = path_of(override)
        if path[0] in groups:
            paths.append(path)
        elif path != [key]:
            fix = f"which takes those of {', '.join(groups)} alone" if groups else "leave it out"
            raise ConfigError(f"{override}: has no effect beside {key}=, {fix}")
    return sorted(paths, key=len)


def config_of_folder(config: Config, *groups: str) -> Config:
    """Return the configuration of the run folder that `config` names, if any, else `config` itself.

    Overrides of `groups` on the command line count: a group (benchmark=paper), or a key of it (benchmark.batch_size=4).
    Errors: UserError of `config_of_run`; ConfigError of `beside`.
    """
    if not config.run:
        return config
    of_run, paths = config_of_run(config.run), beside("run", *groups)
    choices = HydraConfig.get().runtime.choices
    if choices["validation"] != ValidationConfig.packaged:  # also where the benchmark brings its own, as `passages`
        paths.append(["validation"])
    for path in paths:
        _carry(path, config, of_run)
    return of_run


def _carry(path: list[str], source, target) -> None:
    """Let `target`, of dataclasses and dictionaries, have at `path` what `source` has there, or nothing either."""
    name, *rest = path
    ours, theirs = (node if isinstance(node, dict) else vars(node) for node in (target, source))
    if name not in theirs:
        ours.pop(name, None)
    elif rest and name in ours:
        _carry(rest, theirs[name], ours[name])
    else:
        ours[name] = theirs[name]


def typed_config(cfg: DictConfig, reads_text: bool = False) -> Config:
    """Return the composed configuration as validated dataclasses. Errors: ConfigError; OmegaConf's for a wrong type;
    with `reads_text`, UserError for text that cannot be prepared."""
    config = OmegaConf.to_object(cfg)
    if not isinstance(config, Config):
        raise ConfigError(
            "the configuration lost its schema: keep `schema` first in the defaults list of conf/train.yaml"
        )
    for key, value, known in _entries(config):
        if not known:
            keys = [name for name, _, there in _entries(config) if there]
            raise ConfigError(f"{key}: unknown key; {nearest(key, keys)}")
        if value == MISSING:
            raise ConfigError(f"{key}=null: must have a value; leave `{key.partition('.')[0]}` as conf/ has it")
    validate(config)
    _expand(config)
    from qat.utils.device import resolve_arithmetic  # PyTorch takes seconds to import: what is unsound is refused first

    # What `auto` is on this machine belongs to the run, wherever its folder is read later; so does its text.
    config.budget.arithmetic = resolve_arithmetic(config.budget.arithmetic)
    config.data.revision = manuals.revision(config.data, make=reads_text)
    return config


def _expand(config: Config) -> None:
    """Put the home folder for `~` where a key names a folder or file. The paths of the model and of texts stay as they
    are written: runs are named by them."""
    nodes = [(config, "runs_dir"), (config, "run"), (config, "record")]
    nodes += [(getattr(config, group), "out") for group in ("report", "bench", "export", "dashboard")]
    for node, name in nodes:
        path = getattr(node, name)
        setattr(node, name, path and files.expand(path))
    config.runs = config.runs and [files.expand(path) for path in config.runs]


def _entries(node, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Return (dotted key, value, whether the schema has it) of all below a node: `+key=value` gets past Hydra."""
    if isinstance(node, dict):
        children = known = node
    elif dataclasses.is_dataclass(node):
        children, known = vars(node), {field.name for field in dataclasses.fields(node)}
    else:
        return
    for key, value in children.items():
        yield f"{prefix}{key}", value, key in known
        yield from _entries(value, f"{prefix}{key}.")


def config_of_run(folder: str) -> Config:
    """Return the configuration of a run folder that the user names, with runs_dir where that folder is now. Errors:
    UserError when it is no run folder, or not the one of its configuration."""
    run = Run(Path(folder).absolute())
    cfg = run.typed_config()
    cfg.runs_dir = str(run.path.parent)
    if cfg.budget.steps:  # the pretrained checkpoint has none
        validate(cfg)
    if run.id != run_id(cfg):
        raise UserError(f"run={folder}: its config.yaml is of {run_id(cfg)}; give the folder that name again")
    return cfg
