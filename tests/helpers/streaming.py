"""A process that streams from a hub: `python -m tests.helpers.streaming` answers a line of JSON with a line of JSON.

HF_ENDPOINT is read while huggingface_hub is imported, so what talks to the fake hub cannot be the tests' own process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from huggingface_hub import HfFileSystem, constants

from qat.config import DataConfig
from qat.data import hub, packing, streaming
from qat.data.heldout import load_heldout
from qat.errors import UserError
from qat.models import tokenizer

ROOT = Path(__file__).resolve().parents[2]  # not out of conftest, which takes the process offline
SEQUENCES, LENGTH = 2, 255  # 512 tokens a micro-batch


class Streamer:
    """One such process. `cache` is its $HIF8_CACHE; its Hugging Face home is its own."""

    def __init__(self, url: str, home: Path, cache: Path):
        home.mkdir(parents=True)
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HIF8_CACHE": str(cache)}
        environment.pop("HF_HUB_OFFLINE")
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "tests.helpers.streaming"]
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def start(self, **work) -> None:
        """Begin what `answer` does; returns at once."""
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()

    def result(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def answer(self, **work) -> dict:
        self.start(**work)
        return self.result()

    def close(self) -> int:
        """The exit status, when the process has been told that there is nothing more to do."""
        self.process.stdin.close()
        return self.process.wait(60)


def _work(
    cfg: dict,
    batches: int = 0,
    state: dict | None = None,
    heldout: int = 0,
    seed: int = 0,
    cache: str | None = None,
    silence: float = 5.0,
) -> dict:
    """Return {"batches", "states" (before each and after the last), "heldout", "error", "said"} of a stream of cfg.
    cache: its $HIF8_CACHE, where that is another; silence: seconds after which a request fails."""
    os.environ["HIF8_CACHE"] = cache or os.environ["USUAL_CACHE"]
    hub.SILENCE = constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = silence
    HfFileSystem.clear_instance_cache()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    hub._reached.clear()
    config = DataConfig(name="fineweb", source="hub", **cfg)
    done = {"batches": [], "states": [], "heldout": None, "error": None}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            if heldout:
                done["heldout"] = load_heldout(config, tokenizer.byte_tokenizer(), heldout)[0].tolist()
            stream = packing.training_stream(config, seed, tokenizer.byte_tokenizer(), state)
            for _ in range(batches):
                done["states"].append(stream.state())
                done["batches"].append(stream.micro_batch(SEQUENCES, LENGTH).tolist())
            done["states"].append(stream.state())
        except UserError as error:
            done["error"] = str(error)
    return done | {"said": said.getvalue()}


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored from the start in a shell's background job
    nap = time.sleep
    time.sleep = lambda seconds: nap(min(seconds, 0.01))  # the hub's own retries, too
    hub.FIRST_WAIT, hub.LONGEST_WAIT = 0.01, 0.02
    os.environ["USUAL_CACHE"] = os.environ["HIF8_CACHE"]
    streaming.HELDOUT_DOCUMENTS, streaming._AHEAD, streaming._LEAST_READ = 15, 1, 256
    for line in sys.stdin:
        print(json.dumps(_work(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
