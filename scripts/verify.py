"""Compare the runs of a record with the same runs as they were repeated here.

python scripts/verify.py record=experiments/records/<date>_<name> [runs_dir=runs]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from qat import records
    from qat.verify import verify

    text, failed = verify(records.named(config), Path(config.runs_dir))
    print(text)
    if failed:
        raise cli.UserError(f"{failed} of the rows above: outside of the record's intervals, or not comparable with it")


if __name__ == "__main__":
    cli.entry(main, takes=("record",))
