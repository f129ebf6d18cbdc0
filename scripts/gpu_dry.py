"""Compile the training step of the paper's model for a GPU that is not there; write a table into docs/performance.md.

python scripts/gpu_dry.py            every variant; or name some: python scripts/gpu_dry.py max "all linears"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.errors import UserError
from qat.tools.gpu_dry import table


def main(names: list[str]) -> None:
    table.check(names)
    rows = {}
    for name, facts in table.traces(names or list(table.VARIANTS)):
        rows[name] = facts
        print(f"{name}: {facts}", flush=True)
    if not names:
        table.write(rows)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
