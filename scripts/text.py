"""Prepare the text that runs read, where the cache has none, and say what is in it.

python scripts/text.py data=manuals
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.data import manuals
    from qat.errors import ConfigError

    if config.data.source != "prepared":
        raise ConfigError(f"data={config.data.name}: needs no preparing; name a text that does, as in data=manuals")
    print(manuals.described(manuals.folder(config.data)))


if __name__ == "__main__":
    entry.run(main, reads_text=True)
