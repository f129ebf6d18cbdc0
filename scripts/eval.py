"""Score a trained run, its baseline and the untouched checkpoint, and compare them.

python scripts/eval.py experiment=exp8 [the overrides that trained it] [benchmark=paper]
python scripts/eval.py run=runs/<id> [benchmark=paper] [logger=local]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from qat.evaluate import evaluate

    evaluate(cli.of_folder(config, "benchmark", "logger"))


if __name__ == "__main__":
    cli.entry(main, takes=("run",), reads_text=True)
