"""Print what differs between two experiments, or two runs, key by key.

python scripts/diff.py report.experiments=[exp7,exp8] [protocol=released any.key=value]
python scripts/diff.py runs=[runs/a,runs/b]
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry
from qat.errors import ConfigError


def main(config, _) -> None:
    from omegaconf import OmegaConf

    from qat.analysis.compare import differences
    from qat.cli import experiments
    from qat.report.experiment import told_apart
    from qat.report.selection import run_folders
    from qat.runs.identity import run_id

    key, names, example = "report.experiments", config.report.experiments, "[exp7,exp8]"
    if config.runs is not None:
        key, names, example = "runs", config.runs, "[runs/a,runs/b]"
    if len(names) != 2:
        raise ConfigError(f"{key}={names}: name two, as in {key}={example}")
    if config.runs is not None:
        entry.beside("runs")
        cells = [[run.typed_config()] for run in run_folders(names)]
    else:
        cells = [[job.cfg for job in experiments.jobs_of(name, entry.overrides())] for name in names]
    sides = [{run_id(cell): OmegaConf.to_container(OmegaConf.structured(cell)) for cell in side} for side in cells]
    labels = [told_apart(side) for side in sides]
    for one, other in itertools.product(*sides):
        print("  ".join(f"{names[k]} {labels[k][run]}".strip() for k, run in enumerate((one, other))))
        for key, (ours, theirs) in differences(sides[0][one], sides[1][other]).items():
            print(f"  {key}: {ours} -> {theirs}")


if __name__ == "__main__":
    entry.run(main, takes=("runs", "report.experiments"))
