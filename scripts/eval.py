"""Score a trained run, its baseline and the pretrained checkpoint, and compare them.

python scripts/eval.py experiment=exp8 [the overrides that trained it] [benchmark=paper]
python scripts/eval.py run=runs/<id> [benchmark=paper] [validation=passages] [logger=local]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli.runner import evaluate_and_compare

    evaluate_and_compare(entry.config_of_folder(config, "benchmark", "validation", "logger"))


if __name__ == "__main__":
    entry.run(main, takes=("run",), reads_text=True)
