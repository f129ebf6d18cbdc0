"""Keep a report, or a study alone, and the small parts of its runs as a record that git can hold.

python scripts/record.py record=experiments/records/<date>_<name> [report.out=report] [the overrides of the report]
python scripts/record.py record=experiments/records/<date>_<name> runs=[runs/a,runs/b]     # runs alone, as of a study
                                                                                           # that was interrupted
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.analysis.compare import pretrained_run
    from qat.analysis.rerun_noise import reruns
    from qat.cli.experiments import described
    from qat.report import record
    from qat.report.selection import selected
    from qat.runs import archive
    from qat.runs.folder import Run

    folder = archive.named(config)
    report = Path(config.report.out) if config.runs is None else None
    if report is None:
        entry.beside("runs", "record")
        experiments = selected(config.runs)
    elif (report / "report.md").exists():
        experiments = described(config.report.experiments, entry.overrides(), config.seeds)
    else:  # of a study alone
        experiments = []
    runs = [run for experiment in experiments for run in (*experiment.runs, *experiment.baselines)]
    runs += [Run(Path(config.runs_dir) / name) for name in record.of_studies(report)] if report else []
    runs += [repeat for run in runs if run.config() for repeat in reruns(run)]
    runs += [origin for run in runs if run.config() and (origin := pretrained_run(run))]
    if report:
        record.keep_report(report, folder)
    archived, left = record.keep_runs({run.id: run for run in runs}.values(), folder)
    print(f"record: {folder}, {len(archived)} runs" + "".join(f"\n  left out, not finished: {name}" for name in left))
    if not (folder / "README.md").exists():
        print(f"say in {folder / 'README.md'} what command made it, on what, and what it shows")


if __name__ == "__main__":
    entry.run(main, takes=("record", "runs", "seeds", "report"))
