"""Score a trained run, its baseline and the untouched checkpoint, and compare them.

python scripts/eval.py experiment=exp8 [the words that trained it] [benchmark=paper]
python scripts/eval.py run=runs/<id> [benchmark=paper]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat.evaluate import evaluate
    from qat.runs import config_of

    if config.run:
        benchmark = config.benchmark
        config = config_of(config.run)
        if any(word.startswith("benchmark") for word in HydraConfig.get().overrides.task):
            config.benchmark = benchmark
    evaluate(config)


if __name__ == "__main__":
    cli.entry(main, takes="run", reads_text=True)
