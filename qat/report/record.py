"""The report of a record, and the runs that its studies are made of."""

from __future__ import annotations

import shutil
from pathlib import Path

from qat.errors import UserError
from qat.report.studies import TITLES, results


def of_studies(report: Path) -> set[str]:
    """The runs and baselines of the studies in a report's folder, by name."""
    return {row[key] for study in results(report).values() for row in study["runs"] for key in ("run", "baseline")}


def keep_report(report: Path, record: Path) -> None:
    """Copy a report's folder into a record. Errors: UserError for a folder of no report."""
    studies = [name for name in TITLES if (report / name).exists()]
    if not studies and not (report / "report.md").exists():
        raise UserError(f"{report} has no report.md and no study; write it first: make report")
    record.mkdir(parents=True, exist_ok=True)
    for path in (*report.glob("report.*"), *report.glob("*.png")):
        shutil.copy(path, record)
    for name in studies:
        shutil.copytree(report / name, record / name, dirs_exist_ok=True)
