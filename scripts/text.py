"""Prepare the text that runs read, where the cache has none, and say what is in it.

python scripts/text.py data=manuals
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    from qat import texts
    from qat.config import ConfigError

    if config.data.source != "prepared":
        raise ConfigError(f"data={config.data.name}: needs no preparing; name a text that does, as in data=manuals")
    print(texts.described(texts.folder(config.data)))


if __name__ == "__main__":
    cli.entry(main, reads_text=True)
