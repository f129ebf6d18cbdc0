"""Train the run that the configuration describes, after its matched BF16 baseline.

python scripts/train.py experiment=exp8 [budget=.. protocol=.. seed=.. any.key=value]      -m for a sweep
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli.runner import train_with_baseline  # heavy imports only after the configuration proved sound

    train_with_baseline(config)


if __name__ == "__main__":
    entry.run(main, reads_text=True)
