"""Command-line entries: Hydra composes, we validate, and what the user can mend ends in one line and exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.config import Config, ConfigError, UserError, register, validate
from qat.runtime import ROOT

CONF = str(ROOT / "conf")


def entry(config_name: str, work: Callable[[Config, DictConfig], None]) -> None:
    """Run `work` on each composed configuration of `conf/<config_name>.yaml`, as a script's main function.

    In a sweep one failing job does not stop the others; every failure is named at the end and the exit code is 2.
    """
    register()
    # Hydra prints its own multi-line account of an error unless it is told to raise; we say it in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[str] = []

    def job(cfg: DictConfig) -> None:
        try:
            work(typed(cfg), cfg)
        except (UserError, OmegaConfBaseException) as error:
            failures.append(str(error) if isinstance(error, UserError) else explain(error))

    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        failures.append(explain(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        sys.exit(2)


def typed(cfg: DictConfig) -> Config:
    """The composed configuration as validated dataclasses. Errors: ConfigError; OmegaConf's for a wrong type."""
    config = OmegaConf.to_object(cfg)
    if not isinstance(config, Config):
        raise ConfigError(
            "the configuration lost its schema: keep `schema` first in the defaults list of conf/train.yaml"
        )
    validate(config)
    return config


def explain(error: Exception) -> str:
    """One line for Hydra's and OmegaConf's errors: the key, the value, and the nearest valid choice."""
    text = " ".join(str(each) for each in (error, error.__cause__) if each)
    option = re.search(r"Could not find '([\w/.\-]+)/([^/']+)'", text)
    if option:
        group, value = option.groups()
        return f"{group}={value}: unknown choice; {_close(value, _options(group))}"
    group = re.search(r"Could not override '([^']+)'\.?\s*\n?No match in the defaults list", text)
    key = re.search(r"Key '([^']+)' (?:is )?not in '\w+'", text)
    if key:
        full = re.search(r"full_key: (\S+)", text)
        return f"{full[1] if full else key[1]}: unknown key; {_close(full[1] if full else key[1], _keys())}"
    if group:
        return f"{group[1]}: unknown key; {_close(group[1], [*_groups(), *_keys()])}"
    if "must be a string or a list" in text:  # Hydra reads `lr=1e-4` as a number and refuses it as a group's option
        wrong = next((word for word in sys.argv[1:] if word.partition("=")[0] in _groups()), "lr=1e-4")
        group_name, _, value = wrong.partition("=")
        return f"{wrong}: a group takes a name; {_close(value, _options(group_name))} (or set the value: optim.lr=3e-5)"
    value = re.search(r"Value '(.*?)'.* could not be converted to (\w+)", text)
    if value:
        full = re.search(r"full_key: (\S+)", text)
        return f"{full[1] if full else 'value'}={value[1]}: must be of type {value[2].lower()}"
    return re.sub(r"\s+", " ", text)[:400]


def _close(word: str, choices: list[str]) -> str:
    """Names the choice nearest to `word`, comparing whole keys and last parts (`optim.lrr`, `lrr`)."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if not near:
        last = {choice.rpartition(".")[2]: choice for choice in choices}
        near = [last[k] for k in difflib.get_close_matches(word.rpartition(".")[2], last, n=1, cutoff=0.5)]
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose one of {', '.join(sorted(choices))}" if len(choices) <= 12 else "see conf/ for what there is"


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml"))


def _groups() -> list[str]:
    return [path.name for path in Path(CONF).iterdir() if path.is_dir()]


def _keys() -> list[str]:
    def walk(node, prefix: str):
        for key in node:
            yield f"{prefix}{key}"
            value = OmegaConf.select(node, key, throw_on_missing=False)
            if OmegaConf.is_dict(value):
                yield from walk(value, f"{prefix}{key}.")

    return list(walk(OmegaConf.structured(Config), ""))
