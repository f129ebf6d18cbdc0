"""Write the report of the experiments, or of any runs, from their run folders.

python scripts/report.py [report.experiments=[exp8]] [report.out=report] [the words that trained them]
python scripts/report.py runs=[runs/a,runs/b,runs/c] [report.out=report]
"""

import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat import suite
    from qat.report import Experiment, selected, write
    from qat.runs import Run, baseline_of

    experiments = [] if config.runs is None else selected(config.runs)
    for name in config.report.experiments if config.runs is None else ():
        cells = suite.cells(name, list(HydraConfig.get().overrides.task), config.report.seeds)
        runs = [Run.of(cell) for cell in cells]
        baselines = [Run.of(baseline_of(cell)) for cell in cells if cell.quantized]
        experiments.append(Experiment(name, runs, baselines, [run.comparison() for run in runs if run.comparison()]))
    context = {"Command": f"python {' '.join(sys.argv)}", "Date": str(date.today())}
    page, tables = write(experiments, Path(config.report.out), context)
    print(f"report: {page} and {tables}")


if __name__ == "__main__":
    cli.entry(main, takes="runs")
