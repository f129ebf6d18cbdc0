"""List the suite as jobs for a cluster's queue: a file with the overrides of each, baselines first, the report's last.

python scripts/jobs.py [report.experiments=[exp7,exp8]] [report.seeds=[0,1,2]] [the overrides of a run]
Prints how many baselines there are, how many runs with them, and the folder of the file `jobs`.
"""

import shlex
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat.cli import experiments

    words = list(HydraConfig.get().overrides.task)
    baselines, runs = experiments.jobs(config.report.experiments, words, config.report.seeds)
    # Experiments that are sweeps of their own (conf/experiment/exp1.yaml) would otherwise be one here, too.
    lines = [*(["hydra.mode=RUN", *job] for job in (*baselines, *runs)), words]
    folder = Path(config.runs_dir) / ".slurm" / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    folder.mkdir(parents=True)
    (folder / "jobs").write_text("".join(f"{shlex.join(line)}\n" for line in lines))
    print(len(baselines), len(baselines) + len(runs), folder)


if __name__ == "__main__":
    entry.run(main)
