"""Compare the runs of a record with the same runs as they were repeated here.

python scripts/verify.py record=experiments/records/<date>_<name> [runs_dir=runs]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry
from qat.errors import UserError


def main(config, _) -> None:
    from qat.report.verify import verify
    from qat.runs import archive

    text, failed = verify(archive.named(config), Path(config.runs_dir))
    print(text)
    if failed:
        raise UserError(f"{failed} of the rows above: outside of the record's intervals, or not comparable with it")


if __name__ == "__main__":
    entry.run(main, takes=("record",))
