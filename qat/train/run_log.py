"""Write a run's rows of metrics, telemetry and warnings while it trains, mirror them in W&B, and show progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from qat.errors import UserError
from qat.runs import trace
from qat.runs.folder import Run
from qat.utils import environment, files

_FILES = ("metrics.jsonl", "telemetry.jsonl", "warnings.jsonl")


class RunLog:
    """The rows of a run, continued after `done` steps. Rows of later steps are dropped: these steps are run again.

    tensors: names of the quantized ones. skipped: how many steps in a row, up to now, had a gradient that was not
    finite. pretrained: telemetry from before the first step. warned: the warnings so far. Errors: UserError when rows
    are missing.
    """

    def __init__(self, run: Run, done: int, steps: int, tensors: Sequence[str] = ()):
        self.run, self.done, self.steps, self.tensors = run, done, steps, tensors
        rows = [row for row in run.metrics() if row["step"] <= done]
        if [row["step"] for row in rows] != list(range(1, done + 1)):
            raise UserError(
                f"{run.path / 'metrics.jsonl'} is damaged (no row for each of the {done} steps done); delete the run "
                f"folder to make it again"
            )
        self.skipped = 0
        for row in rows:
            self.skipped = self.skipped + 1 if row["skipped"] else 0
        for name in _FILES:
            run.keep_rows(name, done or -1)  # a run that starts again also measures step 0 again
        self.pretrained = [row for row in run.telemetry() if row["step"] == 0]
        self.warned = [row for row in run.warnings() if row["step"] <= done]

    @contextlib.contextmanager
    def opened(self, mirror: Callable) -> Iterator[None]:
        """Write rows within this context, and hand each step to `mirror` (`qat.train.wandb_log.mirror`)."""
        options = {"desc": "  training", "unit": "step", "dynamic_ncols": True, "mininterval": 1.0}
        options["disable"] = not environment.is_main_process()
        with contextlib.ExitStack() as stack:
            self._append = [stack.enter_context(self.run.append(name)) for name in _FILES]
            self._write_amax = stack.enter_context(self.run.traced(self.tensors, self.steps))
            self._mirror = mirror
            self._bar = stack.enter_context(tqdm(total=self.steps, initial=self.done, **options))
            yield

    def begin(self, telemetry: list[dict]) -> None:
        """Write what was measured before the first step."""
        self.pretrained = telemetry
        self._append[1](telemetry)
        self._mirror({"step": 0}, telemetry)

    def write_amax(self, step: int, amax: torch.Tensor) -> None:
        """Write the amaxes of a step, FP32 [tensors], before its row of metrics: they are as long-lived as that."""
        self._write_amax(step, amax.cpu().numpy())

    def write(self, row: dict, telemetry: list[dict], warnings: list[dict]) -> None:
        """Write the rows of a step."""
        self.skipped = self.skipped + 1 if row["skipped"] else 0
        self.warned += warnings
        for append, rows in zip(self._append, ([row], telemetry, warnings), strict=True):
            append(rows)
        self._mirror(row, telemetry)
        for warning in warnings:
            self.say(f"warning: step {row['step']}: {warning['warning']}")
        loss = "skipped" if row["skipped"] else f"{row['loss']:.4f}"
        self._bar.set_postfix_str(f"loss {loss}, {row['tokens_per_second']:.0f} tokens/s")
        self._bar.update()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(line)

    def flush(self) -> None:
        """Write the rows out to the disk: after a crash, a checkpoint without the rows before it would be no use."""
        for name in (*([trace.NAME] if self.tensors else []), *_FILES):
            files.flush(self.run.path / name)
