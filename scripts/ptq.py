"""Score post-training quantization of an experiment's BF16 baseline, a method a row: is training in W8A8 needed?

python scripts/ptq.py [experiment=exp8] [ptq.on=pretrained] [ptq.rungs=[max,awq]] [seeds=[0,1]] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli import runner
    from qat.cli.experiments import variant
    from qat.eval.evaluate import score
    from qat.runs.job import Job
    from qat.studies import ptq
    from qat.studies.ptq_page import write
    from qat.train import wandb_log

    seeds = config.seeds or [config.seed]
    ladders = ptq.design(config.experiment or "exp8", entry.overrides(), variant, seeds)
    for ladder in ladders:
        reference = ladder.reference
        if reference.trained:
            runner.train_job(Job(ladder.cfg, ladder.overrides).baseline, config.launch.ranks)
        if reference in score(ladder.cfg, reference, [reference, *ladder.rows.values()]) and reference.trained:
            wandb_log.send(reference.run, reference.cfg)
    print(f"\nptq: {write(ladders, Path(config.report.out) / 'ptq')}")


if __name__ == "__main__":
    entry.run(main, takes=("seeds", "launch.ranks", "report.out", "ptq"), reads_text=True)
