"""Write the report of the experiments from their run folders.

python scripts/report.py [report.experiments=[exp8]] [report.out=report] [the words that trained them]
"""

import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat import runtime, suite
    from qat.report import Experiment, write
    from qat.runs import Run, baseline_of

    words = list(HydraConfig.get().overrides.task)
    experiments = []
    for name in config.report.experiments:
        cells = suite.cells(name, words, config.report.seeds)
        runs = [Run.of(cell) for cell in cells]
        baselines = [Run.of(baseline_of(cell)) for cell in cells if cell.quantized]
        experiments.append(Experiment(name, runs, baselines, [run.comparison() for run in runs if run.comparison()]))
    environment = runtime.environment()
    context = {
        "Hardware": environment["gpu"] or f"{environment['processor']}, {environment['cores']} cores",
        "Arithmetic": config.budget.arithmetic.upper(),
        "Versions": environment["packages"],
        "Command": f"python {environment['command']}",
        "Date": str(date.today()),
    }
    page, tables = write(experiments, Path(config.report.out), context)
    print(f"report: {page} and {tables}")


if __name__ == "__main__":
    cli.entry("train", main)
