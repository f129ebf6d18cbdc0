"""Cross the paper's factors around exp8: train and score what is missing, and judge the paper's claims.

python scripts/factorial.py [study.seeds=[0,1,2]] [report.out=report] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat.cli import runner
    from qat.cli.experiments import variant
    from qat.studies import design, factorial, measures
    from qat.studies.page import write_factorial

    cells = factorial.design(HydraConfig.get().overrides.task, variant)
    cells = design.replicated(cells, config.study.seeds or [config.seed])
    failed = runner.complete(cells)
    if runner.trained_only():
        return
    measured, missing = measures.read(cells)
    page = write_factorial(measured, missing, cells[-1].cfg, Path(config.report.out) / "factorial")
    print(f"\nfactorial: {page}")
    runner.report(failed)


if __name__ == "__main__":
    entry.run(main, reads_text=True)
