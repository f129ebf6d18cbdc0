"""Say what a run and its baseline will take: memory, hours, disk, downloads. Nothing is trained or downloaded.

python scripts/plan.py experiment=exp8 budget=paper     (WORLD_SIZE=8: on eight ranks)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, composed) -> None:
    from qat.tools.plan import plan
    from qat.tools.plan.machine import here
    from qat.tools.plan.page import page
    from qat.utils import distributed, environment

    distributed.check_world_size(config)
    machine = here(config)
    on_gpus = machine.gpus > 0 or config.budget.compile  # budgets that compile are meant for GPUs
    if on_gpus and composed.budget.arithmetic == "auto":
        config.budget.arithmetic = "bf16"
    print(page(plan.make(config, environment.world_size(), machine, on_gpus)), end="\n\n")


if __name__ == "__main__":
    entry.run(main)
