"""Records: the report of a suite and the runs it was made from, small enough to be kept in git.

<record>/  README.md (by hand: the command, what it shows)  report.md  report.json  *.png
           decide/  factorial/  replay/  audit/  ptq/  sensitivity/ (those of the studies that were made)
           runs.csv (a row a run)  runs-seed<n>.tar.xz (the run folders of a seed, less weights and mirrors)

An archive holds `<id>/<file>` in the order of these names, without times and owners: the same runs give the same bytes.
`restore` puts the runs back into a folder, where a suite continues from them. Weights are not kept; `retrain=true`
trains a run again to have them.
"""

from __future__ import annotations

import csv
import io
import lzma
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from qat.config import Config
from qat.errors import ConfigError, UserError
from qat.runs.folder import Run
from qat.utils import files

_FILES = ("config.yaml", "environment.json", "sources.json", "status.json", "coverage.json", "metrics.jsonl")
_FILES += ("warnings.jsonl", "telemetry.jsonl", "amax.safetensors", "eval.json", "samples/*/*/*.jsonl")

Contents = dict[str, dict[str, bytes]]  # of an archive: {run id: {file: content}}


def named(cfg: Config) -> Path:
    """Return the folder of `record=...`. Errors: ConfigError without it."""
    if not cfg.record:
        raise ConfigError("record=null: name a folder, as in record=experiments/records/2026-01-31_laptop")
    return Path(cfg.record)


def keep(runs: Iterable[Run], record: Path) -> tuple[list[str], list[str]]:
    """Add `runs` to the archives of a record; returns (ids archived, ids left out as unfinished).

    Other runs in the archives stay. Errors: UserError for a damaged archive.
    """
    archived, unfinished, by_seed = [], [], defaultdict(dict)
    for run in runs:
        if run.config() and (run.finished or not run.status()):  # the pretrained model's folder has no status
            by_seed[run.typed_config().seed][run.id] = _read_run(run.path)
            archived.append(run.id)
        else:
            unfinished.append(run.id)
    for seed, contents in by_seed.items():
        archive = record / f"runs-seed{seed}.tar.xz"
        before = _read(archive) if archive.exists() else {}
        record.mkdir(parents=True, exist_ok=True)
        files.replace(archive, _pack(before | contents))
    return archived, unfinished


def restore(record: Path, runs: Path) -> tuple[list[str], list[str]]:
    """Put the runs of a record back into the folder `runs`; returns (ids restored, ids that were there already).

    Errors: UserError for a folder that is no record, or a damaged one; then nothing is restored.
    """
    archives = sorted(record.glob("runs-seed*.tar.xz"))
    if not archives:
        raise UserError(f"record={record}: not a record (no runs-seed<n>.tar.xz); see `ls {record.parent}`")
    contents = {name: of_run for archive in archives for name, of_run in _read(archive).items()}
    for row in table(record):
        if row["run"] not in contents:
            raise UserError(f"{record}/runs-seed{row['seed']}.tar.xz lacks {row['run']}; take it from git again")
    present = [name for name in sorted(contents) if (runs / name).exists()]
    restored = [name for name in sorted(contents) if name not in present]
    for name in restored:
        _write_run(runs / name, contents[name])
    return restored, present


def table(record: Path) -> list[dict[str, str]]:
    """Return the rows of a record's runs.csv (`qat.report.record`); [] without one."""
    path = record / "runs.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def _read_run(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for pattern in _FILES for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _write_run(folder: Path, contents: dict[str, bytes]) -> None:
    with files.new_folder(folder, durable=False) as temporary:  # thousands of files, and git has them
        for name, content in contents.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)


def _pack(contents: Contents) -> bytes:
    members = {f"{run}/{name}": content for run, of_run in contents.items() for name, content in of_run.items()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9) as tar:
        for name, content in sorted(members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _read(archive: Path) -> Contents:
    contents = defaultdict(dict)
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive.read_bytes()))) as tar:
            for member in tar:
                run, *rest = PurePosixPath(member.name).parts
                if not (member.isfile() and rest) or {"..", "/"} & {run, *rest}:
                    raise tarfile.TarError(f"{member.name} is no file of a run")
                contents[run]["/".join(rest)] = tar.extractfile(member).read()
    except (tarfile.TarError, lzma.LZMAError, OSError) as error:
        raise UserError(f"{archive} is damaged ({error}); take it from git again") from error
    return contents
