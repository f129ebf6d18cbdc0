"""Throw the switches between the paper's text and its released code, one at a time, and say what each does.

python scripts/audit.py [seeds=[0,1,2]] [launch.ranks=8] [report.out=report] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli import runner
    from qat.cli.experiments import variant
    from qat.studies import audit, design, measures
    from qat.studies.page import write_audit

    cells, left_out = audit.design(entry.overrides(), variant)
    ranks, seeds = config.launch.ranks, config.seeds or [config.seed]
    cells, untrainable = audit.trainable(design.with_seeds(cells, seeds), ranks)
    outcomes = runner.complete(cells, ranks)
    measured, missing = measures.read(cells)
    page = write_audit(measured, missing, left_out | untrainable, cells[0].cfg, Path(config.report.out) / "audit")
    print(f"\naudit: {page}")
    runner.refuse_failed(outcomes)


if __name__ == "__main__":
    entry.run(main, takes=("seeds", "launch.ranks", "report.out"), reads_text=True)
