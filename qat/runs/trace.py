"""The amax trace of a run, amax.safetensors: FP32 `amax` [steps, tensors], and the tensors' names as metadata.

Row s - 1 has what step s recorded: the largest amaxes over its micro-batches and all ranks (with scaling.sync=none over
the first rank's, with scaling.tick=call over its calls). Zeros: nothing was recorded, or not yet, as in a BF16 warmup
whose history is discarded. NaN: the step was skipped.

The file has its full size from the start, and every row its place: it can be read at any time, a killed process leaves
all rows that it wrote, and a resumed run writes the rows of its steps again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, numpy, safe_open

from qat.errors import UserError
from qat.utils import files

NAME = "amax.safetensors"


@contextlib.contextmanager
def opened(path: Path, names: Sequence[str], steps: int) -> Iterator[Callable[[int, np.ndarray], None]]:
    """Yield a function (step, amax: FP32 [tensors]) that writes the row of a step (1-based)."""
    empty = numpy.save({"amax": np.zeros((steps, len(names)), "<f4")}, {"names": "\n".join(names)})
    rows = len(empty) - 4 * steps * len(names)  # where they begin
    if not path.exists() or path.stat().st_size != len(empty) or _beginning(path, rows) != empty[:rows]:
        files.replace(path, empty)
    with files.naming(path), path.open("r+b") as file:

        def write(step: int, amax: np.ndarray) -> None:
            with files.naming(path):
                file.seek(rows + 4 * (step - 1) * len(names))
                file.write(amax.astype("<f4").tobytes())
                file.flush()

        yield write


def _beginning(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Return (names, FP32 [steps, tensors]). Errors: UserError where there is no trace, or a damaged one."""
    if not path.exists():
        raise UserError(f"{path}: this run has no trace of its amaxes; train it again with this version")
    try:
        with safe_open(path, "np") as content:
            return content.metadata()["names"].split("\n"), content.get_tensor("amax")
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the run folder to make it again") from error
