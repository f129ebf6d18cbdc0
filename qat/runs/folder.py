"""A run is a folder, named by what can change its numbers (`qat.runs.identity`).

runs/<id>/  config.yaml  environment.json  sources.json  status.json  metrics.jsonl  telemetry.jsonl
            amax.safetensors  warnings.jsonl  coverage.json  eval.json  samples/  checkpoints/  wandb/
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.config import COMMAND_GROUPS, Config
from qat.errors import UserError, first_line
from qat.runs import fingerprints
from qat.runs.identity import digest, run_id
from qat.utils import environment, files

if TYPE_CHECKING:
    import numpy as np

_OF_COMMANDS = {*COMMAND_GROUPS, "study"}  # those of recorded runs are of their time


@contextlib.contextmanager
def _readable(path: Path):
    """Turn a parser's errors about a damaged file into a `UserError` that names the file."""
    try:
        yield
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); delete the run folder to make it again") from error


@functools.lru_cache(1024)  # parsing takes a tenth of a second, and a report reads every configuration many times
def _parsed(text: str) -> dict:
    return _mapping(OmegaConf.to_container(OmegaConf.create(text)))


@functools.lru_cache(1024)
def _typed(text: str) -> Config:
    run = {key: value for key, value in _parsed(text).items() if key not in _OF_COMMANDS}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), run))


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
    """Read and write one run folder. A missing file reads as empty."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @classmethod
    def of(cls, cfg: Config) -> Run:
        """Return the folder that belongs to a configuration, whether it exists or not."""
        return (cls if environment.is_main_process() else ReadOnlyRun)(Path(cfg.runs_dir) / run_id(cfg))

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
        """Return the configuration as `Config`. Errors: UserError when the folder is not a run of this version."""
        if not (self.path / "config.yaml").exists():
            raise UserError(f"run={self.path}: not a run folder (no config.yaml); see `ls {self.path.parent}`")
        with _readable(self.path / "config.yaml"):
            return copy.deepcopy(_typed((self.path / "config.yaml").read_text(encoding="utf-8")))

    @property
    def fingerprint(self) -> str:
        """A hash of its training losses and batches. A run trained again with the same hash has the same weights."""
        return digest([(row.get("loss"), row.get("batch")) for row in self.metrics()])

    def status(self) -> dict:
        return self._json("status.json", "state", "step", "steps")

    def environment(self) -> dict:
        """Return the environment of the process that last worked on the run."""
        return self._json("environment.json")

    def environments(self) -> list[dict]:
        """Return the environments of all processes that worked on the run, the last one's last."""
        last = self.environment()
        return [*last.get("earlier", []), last] if last else []

    def evaluations(self) -> dict:
        evaluations = self._json("eval.json")
        with _readable(self.path / "eval.json"):
            for modes in evaluations.values():
                for record in _mapping(modes).values():
                    _mapping(record)
        return evaluations

    def coverage(self) -> dict:
        return self._json("coverage.json")

    def metrics(self) -> list[dict]:
        return self._lines(self.path / "metrics.jsonl", "step")

    def telemetry(self) -> list[dict]:
        return self._lines(self.path / "telemetry.jsonl", "step")

    def warnings(self) -> list[dict]:
        return self._lines(self.path / "warnings.jsonl", "step")

    def amaxes(self) -> tuple[list[str], np.ndarray]:
        """Return the trace of amaxes: (names, FP32 [steps, tensors]), as `qat.runs.trace` has it."""
        from qat.runs import trace  # NumPy is not needed to name a run

        return trace.read(self.path / trace.NAME)

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
            # The process was killed while it wrote a line without an end; after a resume it is written again.
            return [_mapping(json.loads(line), *required) for line in lines if line.endswith("\n")]

    # Writing --------------------------------------------------------------------------------------------------

    def create(self, cfg: Config) -> None:
        self.keep_sources(cfg)
        if not (self.path / "config.yaml").exists():
            self._replace("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg)))
        now, before = environment.describe_environment(), self.environment()
        earlier = before.pop("earlier", [])
        if before and before != now:  # resumed elsewhere, or by another version or command
            earlier.append(environment.brief(before))
        self.write_json("environment.json", now | ({"earlier": earlier} if earlier else {}))

    def check_sources(self, cfg: Config) -> None:
        """Raise `UserError` when the model or text in a path has changed since the run was made from it."""
        before = self._json("sources.json")
        for path, now in fingerprints.hashes(cfg).items() if before else ():
            if before.get(path, now) != now:
                raise UserError(
                    f"{path}: holds other files than {self.path} was made of ({before[path]}, now {now}); put those "
                    f"back, give these another path, or delete the run folder"
                )

    def keep_sources(self, cfg: Config) -> None:
        """Record the hashes of models and texts that sources.json does not have yet."""
        before = self._json("sources.json")
        now = fingerprints.hashes(cfg) | before
        self.path.mkdir(parents=True, exist_ok=True)
        if now != before:
            self.write_json("sources.json", now)

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
        """Yield a function that appends rows to a JSON-lines file, without buffering them."""
        path = self.path / name
        file = path.open("a", encoding="utf-8")

        def write(rows: list[dict]) -> None:
            with files.naming(path):
                file.write(_json_lines(rows))
                file.flush()

        try:
            yield write
        finally:
            with files.naming(path):  # closing writes what could not be written before, and may fail as well
                file.close()

    def traced(self, tensors: Sequence[str], steps: int):
        """Return a context that yields a function to write amaxes of these tensors (`qat.runs.trace.opened`)."""
        from qat.runs import trace

        return trace.opened(self.path / trace.NAME, tensors, steps) if tensors else contextlib.nullcontext()

    def keep_rows(self, name: str, last_step: int) -> None:
        """Drop the rows of steps after `last_step`: a resumed run writes them again."""
        rows = self._lines(self.path / name, "step")
        self._replace(name, _json_lines(row for row in rows if row["step"] <= last_step))

    def _replace(self, name: str | Path, text: str) -> None:
        files.replace(self.path / name, text)

    def lock(self):
        """Lock the folder for writing, as a context. Parallel jobs of a sweep wait for each other's shared baseline."""
        return files.lock(self.path, self.id)


class ReadOnlyRun(Run):
    """A run folder for ranks other than the first: they read it and never write."""

    def create(self, cfg: Config) -> None: ...

    def _replace(self, name: str | Path, text: str) -> None: ...

    @contextlib.contextmanager
    def append(self, name: str):
        yield lambda rows: None

    def traced(self, tensors: Sequence[str], steps: int):
        return contextlib.nullcontext(lambda step, amax: None)

    @contextlib.contextmanager
    def lock(self):
        yield
