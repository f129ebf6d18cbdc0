"""Cross the paper's factors around exp8: train and score what is missing, and judge the paper's claims.

python scripts/factorial.py [study.seeds=[0,1,2]] [report.out=report] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat.studies import cells, factorial, measures
    from qat.studies.page import write_factorial

    design = factorial.design(HydraConfig.get().overrides.task)
    design = cells.replicated(design, config.study.seeds or [config.seed])
    failed = cells.complete(design)
    if cells.trained_only():
        return
    measured, missing = measures.read(design)
    page = write_factorial(measured, missing, design[-1].cfg, Path(config.report.out) / "factorial")
    print(f"\nfactorial: {page}")
    cells.report(failed)


if __name__ == "__main__":
    cli.entry(main, reads_text=True)
