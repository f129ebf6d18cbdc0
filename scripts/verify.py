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

    text, outside = verify(records.named(config), Path(config.runs_dir))
    print(text)
    if outside:
        raise cli.UserError(f"outside of the record's intervals: {outside} of the differences above")


if __name__ == "__main__":
    cli.entry(main, takes=("record",))
