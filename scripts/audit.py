"""Throw the switches between the paper's text and its released code, one at a time, and say what each does.

python scripts/audit.py [study.seeds=[0,1,2]] [report.out=report] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat.studies import audit, cells, measures
    from qat.studies.page import write_audit

    design, left_out = audit.design(HydraConfig.get().overrides.task)
    design, untrainable = audit.trainable(cells.replicated(design, config.study.seeds or [config.seed]))
    failed = cells.complete(design)
    if cells.trained_only():
        return
    measured, missing = measures.read(design)
    page = write_audit(measured, missing, left_out | untrainable, design[0].cfg, Path(config.report.out) / "audit")
    print(f"\naudit: {page}")
    cells.report(failed)


if __name__ == "__main__":
    cli.entry(main, reads_text=True)
