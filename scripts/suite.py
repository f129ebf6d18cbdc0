"""Train, score and report experiments: what is missing, each run after its baseline. `make exp8`, `make suite`.

python scripts/suite.py [report.experiments=[exp8]] [seeds=[0,1,2]] [report.out=report] [the overrides of a run]
python scripts/suite.py launch.ranks=8 [launch.launcher=slurm launch.nodes=2 launch.sbatch="--partition=gpu"] ...
python scripts/suite.py repeat=1 ...        # each run once more, and in the report how far a run and its repeat differ
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli import runner, slurm
    from qat.cli.experiments import described, jobs_of
    from qat.report.page import write_report

    given = entry.overrides()
    names, seeds, launch = config.report.experiments, config.seeds, config.launch
    overrides = [override for override in given if not override.startswith("repeat=")]
    repeats = [[], *([f"repeat={number}"] for number in range(1, config.repeat + 1))]
    jobs = [job for repeat in repeats for name in names for job in jobs_of(name, [*overrides, *repeat], seeds)]
    if launch.launcher == "slurm":
        report = [override for override in overrides if not override.startswith("launch.")]
        print(slurm.submit(jobs, report, launch, config.runs_dir))
        return
    outcomes = runner.complete(jobs, launch.ranks)
    if len(names) == 1:  # else there is a report without those that failed
        runner.refuse_failed(outcomes)
    page, tables = write_report(described(names, overrides, seeds), Path(config.report.out))
    print(f"\nreport: {page} and {tables}")
    runner.refuse_failed(outcomes)


if __name__ == "__main__":
    entry.run(main, takes=("seeds", "launch", "report"), reads_text=True)
