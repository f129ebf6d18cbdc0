"""Measure what quantization costs: kernels, training steps, evaluation, memory.

python scripts/bench.py [model=..] [budget.micro_batch=4 budget.seq_len=256] [budget.compile=true] [bench.rounds=5]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.tools.bench.table import measure

    measure(config)


if __name__ == "__main__":
    entry.run(main, takes=("bench",))
