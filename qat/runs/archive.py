"""Records: the report of a suite and what it was made from, small enough to be kept in git.

<record>/  README.md (by hand: the command, what it shows)  report.md  report.html  *.png  factorial/  audit/
           runs/<id>/  what a run folder has in plain text, and raw.tar.xz with its telemetry and raw samples

Weights are not kept. All else comes back from a record: `restore` puts its runs into a folder, and the suite goes on
where it stood. Where weights are wanted after all, `retrain=true` trains that run again.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

from qat.config import Config
from qat.errors import ConfigError, UserError
from qat.runs.folder import Run

_PLAIN = ("config", "environment", "sources", "status", "coverage", "metrics", "warnings", "eval", "comparison")
_RAW = ("telemetry.jsonl", "samples")
_ARCHIVE = "raw.tar.xz"


def named(cfg: Config) -> Path:
    """The record that a command names. Errors: ConfigError for none."""
    if not cfg.record:
        raise ConfigError("record=null: name a folder, as in record=experiments/records/2026-01-31_laptop")
    return Path(cfg.record)


def keep(runs: Iterable[Run], record: Path) -> tuple[list[str], list[str]]:
    """Copy the small parts of `runs` into a record; (names kept, names left out as unfinished).

    What the record has besides stays. The same runs give the same bytes.
    """
    kept, unfinished = [], []
    for run in runs:
        if run.config() and (run.finished or not run.status()):  # the untouched checkpoint has no status
            _keep(run, record / "runs" / run.id)
            kept.append(run.id)
        else:
            unfinished.append(run.id)
    return kept, unfinished


def restore(record: Path, runs: Path) -> tuple[list[str], list[str]]:
    """Put the runs of a record back into the folder `runs`; (names put back, names that were there already).

    Errors: UserError for what is no record, or is damaged.
    """
    folders = sorted((record / "runs").glob("*/config.yaml"))
    if not folders:
        raise UserError(f"record={record}: not a record (no runs/<id>/config.yaml); see `ls {record.parent}`")
    put, there = [], []
    for folder in (path.parent for path in folders):
        target = runs / folder.name
        if target.exists():
            there.append(folder.name)
            continue
        _restore(folder, target)
        put.append(folder.name)
    return put, there


def _keep(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in run.path.iterdir():
        if path.stem in _PLAIN:
            shutil.copy(path, folder)
    raw = sorted(path for name in _RAW for path in (run.path / name, *(run.path / name).rglob("*")) if path.is_file())
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz", preset=9) as tar:
        for path in raw:
            about = tarfile.TarInfo(str(path.relative_to(run.path)))  # neither times nor owners: equal bytes
            about.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(about, file)
    (folder / _ARCHIVE).write_bytes(archive.getvalue())


def _restore(folder: Path, target: Path) -> None:
    temporary = target.with_name(f".restoring-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(_ARCHIVE))
    try:
        with tarfile.open(folder / _ARCHIVE) as tar:
            for member in tar:  # Python 3.11.2, Debian 12's, cannot filter by itself
                path = temporary / member.name
                if not member.isfile() or temporary.resolve() not in path.resolve().parents:
                    raise tarfile.TarError(f"{member.name} is no file of a run")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder / _ARCHIVE} is damaged ({error}); take it from git again") from error
    temporary.rename(target)
