"""Replay the amaxes that runs recorded: what any scaling rule would have predicted. Trains nothing.

python scripts/replay.py runs=[runs/<id>] [replay.rules=[most_recent,max:16,max:64]] [report.out=report]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry
from qat.errors import ConfigError, nearest


def main(config, _) -> None:
    from qat.studies import replay
    from qat.studies.replay_page import write_replay

    if not config.runs:
        raise ConfigError("runs=null: name run folders of one recipe, as in runs=[runs/<id>]")
    entry.beside("runs", "replay", "report")
    replayed = [replay.read(Path(folder), config.replay.rules) for folder in config.runs]
    replay.refuse_unlike(replayed)
    tensor, names = config.replay.tensor or replay.worst_tensor(replayed), replayed[0].names
    if tensor not in names:
        raise ConfigError(f"replay.tensor={tensor}: is no quantized tensor; {nearest(tensor, names)}")
    print(f"replay: {write_replay(replayed, tensor, Path(config.report.out) / 'replay')}")


if __name__ == "__main__":
    entry.run(main, takes=("runs", "report.out", "replay"))
