"""Write the report of the experiments, or of any runs, from their run folders.

python scripts/report.py [report.experiments=[exp8]] [report.out=report] [the overrides that trained them]
python scripts/report.py runs=[runs/a,runs/b,runs/c] [report.out=report] [benchmark=paper]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli.experiments import described
    from qat.report.page import write_report
    from qat.report.selection import selected

    if config.runs is None:
        experiments = described(config.report.experiments, entry.overrides(), config.seeds)
    else:
        asked = any(path[0] == "benchmark" for path in entry.beside("runs", "report", "benchmark"))
        experiments = selected(config.runs, config.benchmark if asked else None)
    page, tables = write_report(experiments, Path(config.report.out))
    print(f"report: {page} and {tables}")


if __name__ == "__main__":
    entry.run(main, takes=("runs", "seeds", "report"))
