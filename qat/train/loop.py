"""Train one run until its folder is finished: from the start, or on from its last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import math
import time
from collections.abc import Iterator

import torch

from qat.config import Config
from qat.data import packing
from qat.errors import UserError, first_line
from qat.models.load import load_model
from qat.quant.convert import convert
from qat.quant.formats import TOLERANCE
from qat.runs.folder import Run
from qat.train import checkpoint, monitor, wandb_log
from qat.train.run_log import RunLog
from qat.train.shadow import Shadow
from qat.train.state import TrainState
from qat.train.step import StepResult, Trainer
from qat.train.tensor_stats import TensorStats, UpdateStats
from qat.train.validation import Validator
from qat.utils import device, distributed, environment, signals


def train(cfg: Config) -> Run:
    """Train the run of `cfg`, or resume it, or skip it when it is finished. All ranks call this together.

    Errors: UserError. The folder's status records why a run stopped.
    """
    distributed.init()
    run = Run.of(cfg)
    with run.lock():
        run.check_sources(cfg)
        if cfg.retrain and run.finished and not any(run.checkpoints.glob("step-*")):
            print(f"{run.id}: its checkpoint is gone, so it is trained again", flush=True)
            run.set_status("running", 0, cfg.steps)
        if distributed.broadcast_object(run.finished):
            print(f"{run.id}: finished already", flush=True)
            distributed.warn_other_world_size(cfg, run.environment().get("ranks", 1))
            return run
        run.create(cfg)
        step = run.status().get("step", 0)
        try:
            session = _Session(cfg, run)
            step = session.state.done
            with wandb_log.mirror(run, cfg) as mirror:
                for step in session.steps(mirror):  # noqa: B007  after an error, the status records `step`
                    pass
        except BaseException as error:
            distributed.abort()
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):  # on a full disk, raise the first error and not this one
                if not run.finished:
                    run.set_status(state, step, cfg.steps, reason=first_line(error))
            raise
    return run


class _Session:
    """One process's work on a run: build everything, restore the last checkpoint, run the steps that are left."""

    def __init__(self, cfg: Config, run: Run):
        self.cfg, self.run = cfg, run
        device.prepare()
        torch.manual_seed(cfg.seed)
        if cfg.budget.compile:  # in a sweep, a run before this one may have been compiled in this process
            torch._dynamo.reset()  # the number of graphs for the same code is limited
            gc.collect()  # compiled modules refer to themselves, so the model before may still be in memory
        self.model, tokenizer = load_model(cfg.model, cfg.seed)
        self.bank, self.coverage = convert(self.model, cfg)
        self.trainer = Trainer(self.model, self.bank, cfg)
        self.state = TrainState(cfg, run, self.trainer)
        cursor = self.state.restore()
        self.log = RunLog(run, self.state.done, cfg.steps, self.bank.names if self.bank is not None else [])
        self.stream = None if self.state.final else self._open_stream(tokenizer, cursor)
        self.batch = None  # hash of the tokens of the step
        self.shadow = Shadow(self.trainer, cfg, run, self.state.done)
        self.validator = None if self.state.final else Validator(self.trainer, tokenizer, cfg)

    def _open_stream(self, tokenizer, cursor: dict | None) -> packing.TokenStream:
        """Open the text on every rank. The first chooses its revision; on the others, a different text is an error."""
        arguments = self.cfg.data, self.cfg.seed, tokenizer
        stream = packing.training_stream(*arguments, cursor) if environment.is_main_process() else None
        cursor = distributed.broadcast_object(stream and stream.state())
        return stream or packing.training_stream(*arguments, cursor)

    def steps(self, mirror) -> Iterator[int]:
        """Run the steps that are left and finish the run; yields each step's number once its rows are written."""
        cfg, state = self.cfg, self.state
        self._print_start()
        self.run.set_status("running", state.done, cfg.steps)
        with (
            self.log.opened(mirror),
            signals.defer_signals() as signalled,
            checkpoint.Writer(self.run.checkpoints) as writer,
        ):
            if not state.done:
                self.log.begin(self.validator.rows(0))
            for step in range(state.done + 1, cfg.steps + 1):
                writer.check()
                self._announce(step)
                row, telemetry = self._step(step)
                telemetry += self.validator.rows(step)
                self.log.write(row, telemetry, self._watch(step, row, telemetry))
                state.done = step
                yield step
                stop = distributed.any_rank(bool(signalled()))
                if step < cfg.steps and (stop or step % cfg.budget.checkpoint_every == 0):
                    self._save(writer)
                if stop:
                    break
            if state.done == cfg.steps:
                self._finish(writer)
            if distributed.any_rank(bool(signalled())):  # also after the last step: this process shall start no other
                raise signals.Preempted(f"{signalled() or 'another rank'} after step {state.done} of {cfg.steps}")

    def _print_start(self) -> None:
        print(f"\n{self.run.id}")
        print(self.coverage)
        self.run.write_json("coverage.json", dataclasses.asdict(self.coverage))
        if self.trainer.arithmetic == "fp32" and not device.has_bf16_products():
            print("  arithmetic: FP32, in which this processor is faster (budget.arithmetic=bf16 for BF16 products)")
        if self.state.done:
            print(f"  resuming after step {self.state.done} of {self.cfg.steps}", flush=True)

    def _announce(self, step: int) -> None:
        if self.bank is not None and step == self.trainer.first_quantized_step:
            self.log.say(f"  step {step}: quantization starts ({self.cfg.quant.format}, {self.cfg.scaling.algo})")

    def _step(self, step: int) -> tuple[dict, list[dict]]:
        """Run one step. Returns its row of metrics and its telemetry, [] where none is due.

        Telemetry is due at the first quantized step, every k-th after it, and the last.
        """
        start = time.perf_counter()
        batches = self._batches()
        first = self.trainer.first_quantized_step if self.bank is not None else 1
        due = step == self.cfg.steps or (step >= first and (step - first) % self.cfg.budget.telemetry_every == 0)
        if not due:
            return self._row(step, self._train(step, batches), start), []
        before = time.perf_counter()
        rows = self.shadow.rows(step, batches)
        tensors, updates = TensorStats(self.model), UpdateStats(self.model)
        start += time.perf_counter() - before  # these are no part of the step
        with tensors.attached():
            result = self._train(step, batches, observed=self.bank is not None)
        row = self._row(step, result, start)
        return row, [] if row["skipped"] else [*tensors.rows(step), updates.row(step), *rows]

    def _train(self, step: int, batches: list[torch.Tensor], observed: bool = False) -> StepResult:
        result = self.trainer.step(step, batches, observed=observed)
        self.shadow.tick(step, result)
        return result

    def _batches(self) -> list[torch.Tensor]:
        """Return this rank's slice of a step's micro-batches, int64 [sequences, length + 1]."""
        micro, accumulation = self.cfg.batch
        batches = [self.stream.micro_batch(micro, self.cfg.budget.seq_len) for _ in range(accumulation)]
        self.batch = hashlib.blake2b(torch.cat(batches).numpy(), digest_size=4).hexdigest()
        share = accumulation // environment.world_size()
        return batches[environment.rank() * share :][:share]

    def _row(self, step: int, result: StepResult, start: float) -> dict:
        """Return a step's row of metrics. Errors: UserError after too many skipped steps."""
        loss = float(result.loss)  # waits for the device
        seconds = time.perf_counter() - start
        finite = bool(result.finite)
        if not finite:
            self._report_skipped(step, loss)
        if result.amax is not None:
            self.log.write_amax(step, result.amax if finite else torch.full_like(result.amax, math.nan))
        quantized = self.bank is not None and step >= self.trainer.first_quantized_step
        overshoot = result.overshoot if quantized and finite else None
        return {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,
            "lr": result.lr,
            "grad_norm": float(result.grad_norm) if finite else None,
            "skipped": not finite,
            "tokens": result.tokens * step,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(result.tokens / seconds, 1),
            "epoch": self.stream.epoch,
            "batch": self.batch,
            "quantized": quantized,
            **({"objective": float(result.objective) if finite else None} if self.cfg.loss.distill else {}),
            "overshoot_max": None if overshoot is None else float(overshoot.max()),
            "overshoot_share": None if overshoot is None else float((overshoot > TOLERANCE).float().mean()),
        }

    def _report_skipped(self, step: int, loss: float) -> None:
        """Warn of a step that changed nothing; raise `UserError` after more than `optim.max_skipped` in a row."""
        message = f"step {step}: the gradient is not finite (loss {loss:.4g}), weights were not changed"
        in_a_row = self.log.skipped + 1
        if in_a_row > self.cfg.optim.max_skipped:
            raise UserError(
                f"{message}, {in_a_row} in a row; lower optim.lr={self.cfg.optim.lr:g} or change "
                f"quant.overflow={self.cfg.quant.overflow}"
            )
        print(f"\nwarning: {message}", flush=True)

    def _watch(self, step: int, row: dict, telemetry: list[dict]) -> list[dict]:
        """Return the new warnings of a step, as rows of warnings.jsonl."""
        cfg, warnings = self.cfg, []
        if step == 1 and row["loss"] is not None:
            warnings += monitor.first_loss(cfg, self.model.config.vocab_size, row["loss"])
        if telemetry:
            self.state.check_agreement()
            warnings += monitor.telemetry(cfg, telemetry, row["lr"])
            warnings += monitor.forgetting(cfg, telemetry, self.log.pretrained)
        return [{"step": step, **warning} for warning in monitor.new_warnings(warnings, self.log.warned)]

    def _save(self, writer: checkpoint.Writer) -> None:
        """Write a checkpoint to resume from, in the background."""
        self.state.check_agreement()
        tensors = self.state.resumable()
        if environment.is_main_process():
            self.log.flush()
            writer.save(self.state.done, tensors, self.state.facts(data=self.stream.state()))
            self.run.set_status("running", self.state.done, self.cfg.steps)

    def _finish(self, writer: checkpoint.Writer) -> None:
        """Write the last checkpoint, of weights and scales only, and remove the others."""
        tensors, folder = self.state.trained(), self.run.checkpoints
        writer.wait()
        if environment.is_main_process():
            if self.state.final:  # already written by a process that was stopped while it removed the others
                checkpoint.keep_newest(folder, 1)
            else:
                self.log.flush()
                checkpoint.save(folder, self.state.done, tensors, self.state.facts(), keep=1)
        self.run.set_status("finished", self.state.done, self.cfg.steps)
