"""Put the runs of a record back into runs/, so that its suite can be shown again or go on. Nothing is overwritten.

python scripts/restore.py record=experiments/records/<date>_<name>
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.runs import archive

    put, there = archive.restore(archive.named(config), Path(config.runs_dir))
    print(f"restored: {len(put)} runs into {config.runs_dir}" + (f"; {len(there)} were there already" if there else ""))


if __name__ == "__main__":
    entry.run(main, takes=("record",))
