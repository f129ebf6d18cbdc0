"""Cross the paper's factors around exp8: train and score what is missing, and judge the paper's claims.

python scripts/factorial.py [seeds=[0,1,2]] [launch.ranks=8] [report.out=report] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli import runner
    from qat.cli.experiments import variant
    from qat.studies import design, factorial, measures
    from qat.studies.page import write_factorial

    cells = factorial.design(entry.overrides(), variant)
    cells = design.with_seeds(cells, config.seeds or [config.seed])
    outcomes = runner.complete(cells, config.launch.ranks)
    measured, missing = measures.read(cells)
    page = write_factorial(measured, missing, cells[-1].cfg, Path(config.report.out) / "factorial")
    print(f"\nfactorial: {page}")
    runner.refuse_failed(outcomes)


if __name__ == "__main__":
    entry.run(main, takes=("seeds", "launch.ranks", "report.out"), reads_text=True)
