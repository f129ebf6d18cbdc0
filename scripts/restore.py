"""Put the runs of a record back into runs/, so that its suite can be shown again or go on. Nothing is overwritten.

python scripts/restore.py record=experiments/records/<date>_<name>
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from qat import records

    put, there = records.restore(records.named(config), Path(config.runs_dir))
    print(f"restored: {len(put)} runs into {config.runs_dir}" + (f"; {len(there)} were there already" if there else ""))


if __name__ == "__main__":
    cli.entry(main, takes=("record",))
