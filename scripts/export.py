"""Write a finished run as a Hugging Face folder of 8-bit codes, with a model card.

python scripts/export.py run=runs/<id> [export.out=folder]
python scripts/export.py experiment=exp8 [the overrides that trained it]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.export.export import export

    export(entry.config_of_folder(config, "export"))


if __name__ == "__main__":
    entry.run(main, takes=("run", "export"))
