"""Train one run from its configuration to a finished folder, from wherever it stands."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from qat.config import Config
from qat.data import packing
from qat.errors import UserError
from qat.models.load import load_model
from qat.quant.convert import convert
from qat.quant.formats import TOLERANCE
from qat.runs.folder import Run
from qat.train import checkpoint, monitor, wandb_log
from qat.train.step import StepResult, Trainer
from qat.train.tensor_stats import TensorStats, UpdateStats
from qat.train.validation import Validator
from qat.utils import device, distributed, signals
from qat.utils.files import flush

_ROWS = ("metrics.jsonl", "telemetry.jsonl", "warnings.jsonl")


def train(cfg: Config) -> Run:
    """Train, resume or skip the run of `cfg`, all ranks together. Errors: UserError; the folder's status says why it
    failed."""
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
            step = session.done
            with wandb_log.mirror(run, cfg) as log:
                for step in session.steps(log):  # noqa: B007  `step` is what the status says after an error
                    pass
        except BaseException as error:
            distributed.abort()
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):  # a full disk must not hide what happened first
                if not run.finished:
                    run.set_status(state, step, cfg.steps, reason=reason)
            raise
    return run


class _Session:
    """One process's work on a run: state that lives between steps."""

    def __init__(self, cfg: Config, run: Run):
        self.cfg, self.run, self.done, self.final = cfg, run, 0, False
        self.skipped = 0  # steps in a row, until now
        self.batch = None  # hash of the tokens of the step
        device.prepare()
        torch.manual_seed(cfg.seed)
        if cfg.budget.compile:  # a sweep trains many runs in one process, and graphs of one code are limited
            torch._dynamo.reset()
            gc.collect()  # compiled modules refer to themselves: the model of the run before is still there
        self.model, self.tokenizer = load_model(cfg.model, cfg.seed)
        self.bank, self.coverage = convert(self.model, cfg)
        self.trainer = Trainer(self.model, self.bank, cfg)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        cursor, self.stream = self._restore(), None
        if not self.final:
            self.stream = self._open_stream(self.tokenizer, cursor)
        self.history = None if self.bank is None else monitor.History(self.bank)
        self.texts = None if self.final else Validator(self.trainer, self.tokenizer, cfg)

    def _open_stream(self, tokenizer, cursor: dict | None) -> packing.TokenStream:
        """Open the text on every rank: the first decides which revision of it is read, the others refuse another."""
        arguments = self.cfg.data, self.cfg.seed, tokenizer
        stream = packing.training_stream(*arguments, cursor) if distributed.is_main_process() else None
        cursor = distributed.broadcast_object(stream and stream.state())
        return stream or packing.training_stream(*arguments, cursor)

    def _restore(self) -> dict | None:
        """Continue from the newest sound checkpoint, or start. Returns the data cursor."""
        found = checkpoint.latest(self.run.checkpoints, self.run.id)
        if found is not None:
            with checkpoint.restoring(self.run.checkpoints):
                self._load(*found)
        distributed.check_agreement("the step to continue from", torch.tensor([self.done]))
        rows = [row for row in self.run.metrics() if row["step"] <= self.done]
        if [row["step"] for row in rows] != list(range(1, self.done + 1)):
            raise UserError(
                f"{self.run.path / 'metrics.jsonl'} is damaged (no row for each of the {self.done} steps done); delete "
                f"the run folder to make it again"
            )
        for row in rows:
            self.skipped = self.skipped + 1 if row.get("skipped") else 0
        for name in _ROWS:
            self.run.keep_rows(name, self.done or -1)  # what was seen before the first step comes again, too
        self.untouched = [row for row in self.run.telemetry() if row["step"] == 0]
        self.warned = [row for row in self.run.warnings() if row["step"] <= self.done]
        return found[1].get("data") if found else None

    @torch.no_grad()
    def _load(self, tensors: dict[str, dict[str, torch.Tensor]], facts: dict) -> None:
        saved = checkpoint.matched(tensors, "model", {name: parameter for parameter, name in self.names.items()})
        for parameter, name in self.names.items():
            parameter.copy_(distributed.shard_like(saved[name], parameter))
        if self.bank is not None:
            scales = tensors.get(_of_rank("scales", distributed.rank()), tensors.get("scales", {}))
            self.bank.load_state_dict(scales, facts.get("scales"))
        self.done, self.final = facts["step"], "final" in facts
        if self.done < self.cfg.steps and self.bank is not None:
            distributed.refuse_other_world_size(self.cfg, facts.get("ranks", 1))
        if self.done < self.cfg.steps:  # the last checkpoint has no need of what follows
            checkpoint.load_optimizer(self.trainer.optimizer, self.names, tensors)
            device.set_rng_state(tensors.get(_of_rank("rng", distributed.rank()), {}))

    def steps(self, log) -> Iterator[int]:
        """Run the steps that are left and finish; yields the number of each when it is done and written."""
        cfg, run = self.cfg, self.run
        self._introduce()
        run.set_status("running", self.done, cfg.steps)
        with (
            run.append("metrics.jsonl") as metrics,
            run.append("telemetry.jsonl") as telemetry,
            run.append("warnings.jsonl") as warnings,
            _bar(self) as bar,
            signals.defer_signals() as signalled,
            checkpoint.Writer(run.checkpoints) as self.writer,
        ):
            if not self.done:
                self.untouched = self.texts.rows(0)
                telemetry(self.untouched)
                log({"step": 0}, self.untouched)
            for step in range(self.done + 1, cfg.steps + 1):
                self.writer.check()
                self._announce(step, bar)
                row, probed = self._step(step)
                probed += self.texts.rows(step)
                found = self._watch(step, row, probed)
                metrics([row])
                telemetry(probed)
                warnings(found)
                log(row, probed)
                for each in found:
                    bar.write(f"warning: step {step}: {each['warning']}")
                self.done = step
                bar.set_postfix_str(_progress(row))
                bar.update()
                yield step
                stop = distributed.any_rank(bool(signalled()))
                if step < cfg.steps and (stop or step % cfg.budget.checkpoint_every == 0):
                    self._save()
                if stop:
                    break
            if self.done == cfg.steps:
                self._finish()
            if distributed.any_rank(bool(signalled())):  # after the last step, too: other runs are to begin elsewhere
                raise signals.Preempted(f"{signalled() or 'another rank'} after step {self.done} of {cfg.steps}")

    def _introduce(self) -> None:
        cfg, arithmetic = self.cfg, self.trainer.arithmetic
        print(f"\n{self.run.id}")
        print(self.coverage)
        self.run.write_json("coverage.json", self.coverage.as_dict())
        if arithmetic == "fp32" and not device.has_bf16():
            print("  arithmetic: FP32; this processor has no BF16 instructions (budget.arithmetic=bf16 emulates them)")
        if self.done:
            print(f"  resuming after step {self.done} of {cfg.steps}", flush=True)

    def _announce(self, step: int, bar: tqdm) -> None:
        if self.bank is not None and step == self.trainer.first_quantized_step:
            bar.write(f"  step {step}: quantization starts ({self.cfg.quant.format}, {self.cfg.scaling.algo})")

    def _step(self, step: int) -> tuple[dict, list[dict]]:
        """One step: its row of metrics, and its telemetry where that is due: at the first, every k-th and the last
        quantized step."""
        started = time.perf_counter()
        batches = self._batches()
        first = self.trainer.first_quantized_step if self.bank is not None else 1
        due = step == self.cfg.steps or (step >= first and (step - first) % self.cfg.budget.telemetry_every == 0)
        if not due:
            return self._row(step, self.trainer.step(step, batches), started), []
        updates = UpdateStats(self.model, self.bank, self.cfg)
        if self.bank is None:
            return self._row(step, self.trainer.step(step, batches), started), [updates.row(step)]
        probe = TensorStats(self.model, self.bank, self.cfg)
        with probe.attached():
            result = self.trainer.step(step, batches, observed=True)
        row = self._row(step, result, started)
        return row, [] if row["skipped"] else [*probe.rows(step), updates.row(step)]

    def _batches(self) -> list[torch.Tensor]:
        """Return this rank's slice of a step's micro-batches, int64 [sequences, length + 1]."""
        micro, accumulation = self.cfg.batch
        batches = [self.stream.micro_batch(micro, self.cfg.budget.seq_len) for _ in range(accumulation)]
        self.batch = hashlib.blake2b(torch.cat(batches).numpy(), digest_size=4).hexdigest()
        share = accumulation // distributed.world_size()
        return batches[distributed.rank() * share :][:share]

    def _row(self, step: int, result: StepResult, started: float) -> dict:
        loss = float(result.loss)
        seconds = time.perf_counter() - started
        finite = bool(result.finite)
        self._count_skipped(step, finite, loss)
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
            "overshoot_max": None if overshoot is None else float(overshoot.max()),
            "overshoot_share": None if overshoot is None else float((overshoot > TOLERANCE).float().mean()),
        }

    def _count_skipped(self, step: int, finite: bool, loss: float) -> None:
        """A step without a finite gradient changed nothing; too many in a row will not mend themselves."""
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            return
        said = f"step {step}: the gradient is not finite (loss {loss:.4g}), weights were not changed"
        if self.skipped > self.cfg.optim.max_skipped:
            raise UserError(
                f"{said}, {self.skipped} in a row; lower optim.lr={self.cfg.optim.lr:g} or change "
                f"quant.overflow={self.cfg.quant.overflow}"
            )
        print(f"\nwarning: {said}", flush=True)

    def _watch(self, step: int, row: dict, probed: list[dict]) -> list[dict]:
        """Warnings of a step: rows of warnings.jsonl."""
        found = []
        if step == 1 and row["loss"] is not None:
            found += monitor.first_loss(self.cfg, self.model.config.vocab_size, row["loss"])
        if self.history is not None and row["quantized"] and not row["skipped"]:
            if step == self.trainer.first_quantized_step:
                self.history.begin()
            self.history.advance(
                1 if self.cfg.scaling.tick == "step" else self.cfg.batch[1] // distributed.world_size()
            )
        if probed:
            self._check_agreement()
            found += monitor.telemetry(self.cfg, probed, row["lr"])
            found += monitor.forgetting(self.cfg, probed, self.untouched)
            found += self.history.check() if self.history is not None else []
        new = [{"step": step, **each} for each in monitor.new_warnings(found, self.warned)]
        self.warned += new
        return new

    def _check_agreement(self) -> None:
        if self.bank is not None and self.cfg.scaling.sync == "max":
            distributed.check_agreement("scales", self.bank.scale)

    def _save(self) -> None:
        self._check_agreement()
        tensors = self._trained() | {"optimizer": checkpoint.optimizer_tensors(self.trainer.optimizer, self.names)}
        own = {"rng": device.rng_state()}
        if self.bank is not None and self.cfg.scaling.sync == "none":
            own["scales"] = {name: tensor.cpu() for name, tensor in self.bank.state_dict().items()}
        for rank, groups in enumerate(distributed.all_gather_object(own)):
            tensors |= {_of_rank(name, rank): group for name, group in groups.items()}
        if not distributed.is_main_process():
            return
        self._flush_rows()
        self.writer.save(self.done, tensors, self._facts(data=self.stream.state()))
        self.run.set_status("running", self.done, self.cfg.steps)

    def _flush_rows(self) -> None:
        """A checkpoint must not outlive the rows before it."""
        for name in _ROWS:
            flush(self.run.path / name)

    def _trained(self) -> dict[str, dict[str, torch.Tensor]]:
        """Parameters and scales, gathered from all ranks on the first (`qat.utils.distributed.full_tensor_on_main`)."""
        tensors = {
            "model": {name: distributed.full_tensor_on_main(parameter) for parameter, name in self.names.items()}
        }
        return tensors if self.bank is None else tensors | {"scales": self.bank.state_dict()}

    def _facts(self, **more) -> dict:
        """What a checkpoint says of itself: whose it is, and of what its scales are."""
        names = self.bank.names if self.bank is not None else None
        return {"run": self.run.id, "scales": names, "ranks": distributed.world_size(), **more}

    def _finish(self) -> None:
        """Leave the trained weights and scales; what only a resume needs goes."""
        tensors = self._trained()
        self.writer.wait()
        if (
            distributed.is_main_process() and self.final
        ):  # stopped while the others went: there may be no other, so it stays as it is
            checkpoint.keep_newest(self.run.checkpoints, 1)
        elif distributed.is_main_process():
            self._flush_rows()
            checkpoint.save(self.run.checkpoints, self.done, tensors, self._facts(final=True), keep=1)
        self.run.set_status("finished", self.done, self.cfg.steps)


def _of_rank(name: str, rank: int) -> str:
    """What a checkpoint calls a group of tensors that every rank has its own of."""
    return f"{name}.{rank}" if rank else name


def _bar(session: _Session) -> tqdm:
    steps, done = session.cfg.steps, session.done
    look = {"desc": "  training", "unit": "step", "dynamic_ncols": True, "mininterval": 1.0}
    return tqdm(total=steps, initial=done, disable=not distributed.is_main_process(), **look)


def _progress(row: dict) -> str:
    loss = "skipped" if row["skipped"] else f"{row['loss']:.4f}"
    return f"loss {loss}, {row['tokens_per_second']:.0f} tokens/s"
