"""Score a finished run: benchmarks through lm-eval, held-out loss, and KL divergence to the matched baseline.

Five things are scored for a quantized run: the untouched checkpoint, the matched BF16 baseline, that baseline in W8A8
without QAT (`qat.ptq`), and the run both ways: its weights in BF16 without quantizers (`bf16`, what the paper reports),
and W8A8 with frozen scales (`w8a8`), whose held-out loss is also taken under PTQ's scales. Every model is scored as it
would be exported, with its parameters in BF16. Nothing is written into a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qat import benchmarks, checkpoint, data, loop, models, ptq, ranks, runtime, tracking
from qat.compare import compare
from qat.config import Config, ConfigError, UserError
from qat.convert import convert
from qat.floor import floor, original
from qat.identity import baseline_of, is_ptq, ptq_mode, untouched_of
from qat.runs import Run
from qat.scaling import Phase
from qat.wording import FLOOR_HEADER, floor_cells, markdown, table

_HELDOUT_BATCH = 4  # sequences a forward call


@dataclass
class Subject:
    """One model to score: its configuration, the run folder with its weights, and how its linears run."""

    cfg: Config
    run: Run
    mode: str  # bf16; w8a8, with the run's own scales; or `qat.identity.ptq_mode`, with calibrated ones

    @property
    def trained(self) -> bool:
        return self.cfg.budget.steps > 0

    @property
    def calibrated(self) -> bool:
        return is_ptq(self.mode)

    def build(self) -> tuple[nn.Module, object]:
        """(the model in eval mode, its tokenizer). Errors: UserError when the run is not finished."""
        model, tokenizer = models.load(self.cfg.model, self.cfg.seed)
        tensors, facts = self._checkpoint() if self.trained else ({}, {})
        # Parameters only: rotary frequencies must stay FP32, as they are in training.
        stored = torch.bfloat16 if runtime.arithmetic(self.cfg.budget.arithmetic) == "bf16" else torch.float32
        parameters = saved = dict(model.named_parameters())
        if self.trained:
            with checkpoint.restoring(self.run.checkpoints):
                saved = checkpoint.matched(tensors, "model", parameters)
        for name, parameter in parameters.items():
            parameter.data = saved[name].detach().to(parameter.device).bfloat16().to(stored)
        model.eval()
        if self.mode == "bf16":
            return model, tokenizer
        bank, _ = convert(model, self.cfg)
        if self.calibrated:
            ptq.calibrate(model, bank, self.cfg, tokenizer)
        else:
            with checkpoint.restoring(self.run.checkpoints):
                bank.load_state_dict(tensors.get("scales", {}), facts.get("scales"))
        bank.phase = Phase.FROZEN
        return model, tokenizer

    def check(self) -> None:
        """Raise `UserError` when there is nothing to score yet, or no longer what it was made of."""
        if self.trained and not self.run.finished:
            state = self.run.status()
            progress = f"at step {state['step']} of {state['steps']}" if state else "not started"
            raise UserError(
                f"{self.run.id} is {progress}; train it first: `python scripts/train.py` with the same overrides"
            )
        self.run.check_sources(self.cfg)

    def regain(self) -> None:
        """Train it again when its checkpoint is gone. What was scored before counts if its losses are the same."""
        if self.trained and not self.calibrated and not any(self.run.checkpoints.glob("step-*")):
            print(f"{self.run.id}: its checkpoint is gone, so it is trained again", flush=True)
            loop.train_again(self.cfg)

    def _checkpoint(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        self.check()
        found = checkpoint.latest(self.run.checkpoints, self.run.id)
        if found is None:
            raise UserError(f"{self.run.path}: its checkpoint is gone; delete the folder and train it again")
        return found


def evaluate(cfg: Config) -> dict | None:
    """Score what `cfg` describes and what it is compared with, skipping what is scored already.

    Returns the comparison with the baseline, which is also written to the run folder (None for a BF16 run).
    """
    if ranks.count() > 1:
        raise ConfigError("evaluation is one process's work: start scripts/eval.py without torchrun")
    runtime.prepare()
    run = Run.of(cfg)
    untouched, baseline = Subject(untouched_of(cfg), Run.of(untouched_of(cfg)), "bf16"), baseline_of(cfg)
    reference = Subject(baseline, Run.of(baseline), "bf16")
    subjects = [untouched, reference]
    if cfg.quantized:
        subjects += [Subject(ptq.ptq_of(cfg), reference.run, ptq_mode(cfg.quant))]
        subjects += [Subject(cfg, run, "bf16"), Subject(cfg, run, "w8a8")]
    for subject in subjects:
        subject.check()
    scorer = _Scorer(cfg, reference)
    if not all(map(scorer.scored, subjects)):
        reference.regain()  # first of all: others are compared with its predictions
    for subject in subjects:  # before any is scored: with other losses, what is there of a run is of other weights
        if not scorer.scored(subject):
            subject.regain()
    for subject in subjects:
        scorer.score(subject)
    comparison = None
    if cfg.quantized:
        comparison = compare(run.path, reference.run.path, cfg.benchmark.name, untouched.run.path)
        with run.lock():
            run.write_json("comparison.json", comparison)
        tracking.send(run, cfg)
        print(f"\n{table(comparison)}", flush=True)
    if cfg.repeat:
        _print_floor([reference.run, run] if cfg.quantized else [run], cfg.benchmark.name)
    return comparison


def _print_floor(repeats: list[Run], benchmark: str) -> None:
    """Repetitions beside their originals, as far as these exist."""
    found = [floor(original(repeat), repeat, benchmark) for repeat in repeats if original(repeat).finished]
    if found:
        print(f"\n{markdown(FLOOR_HEADER, [floor_cells(row) for row in found])}", flush=True)


class _Scorer:
    """Scores subjects with one benchmark and the held-out texts, and writes the results to their folders."""

    def __init__(self, cfg: Config, reference: Subject):
        self.cfg, self.reference = cfg, reference

    def scored(self, subject: Subject) -> bool:
        """Whether its folder has the scores of these weights, for what is asked."""
        done = self._done(subject)
        # Results of earlier versions have no losses under PTQ's scales: they are left out of the comparison.
        calibrated = done.get("calibrated", {}).get("sequences", ptq.SEQUENCES)
        return done.get("asked") == self._asked(subject) and calibrated == ptq.SEQUENCES

    def _done(self, subject: Subject) -> dict:
        """What its folder has of these weights."""
        done = subject.run.evaluations().get(self.cfg.benchmark.name, {}).get(subject.mode, {})
        # Results of earlier versions do not say what they are of.
        return done if done.get("of", self._of(subject)) == self._of(subject) else {}

    def _of(self, subject: Subject) -> list[str]:
        """The weights that a result is of, and those that it is compared with."""
        return [subject.run.fingerprint, *([self.reference.run.fingerprint] if subject.cfg.quantized else [])]

    def _asked(self, subject: Subject) -> dict:
        """A result counts only for what was asked: other questions, text or calibration are scored anew."""
        data, benchmark = self.cfg.data, dataclasses.asdict(self.cfg.benchmark)
        heldout = {"path": data.path, "subset": data.subset, "tokens": self.cfg.budget.heldout_tokens, "by": "document"}
        heldout |= {"revision": data.revision} if data.revision else {}
        kind = self.cfg.probe
        probe = {"probe": {"path": kind.path, "subset": kind.subset, "revision": kind.revision}} if kind else {}
        calibrated = {"calibration_sequences": ptq.SEQUENCES} if subject.calibrated else {}
        return {"benchmark": benchmark, "heldout": heldout} | probe | calibrated

    @functools.cached_property
    def _baseline(self) -> nn.Module:
        """The matched baseline, built once for all that is compared with its predictions."""
        return self.reference.build()[0]

    def score(self, subject: Subject) -> None:
        name, mode = self.cfg.benchmark.name, subject.mode
        if self.scored(subject):
            early = mode == "w8a8" and "calibrated" not in self._done(subject)
            note = ", without losses under PTQ's scales: to have them, delete its eval.json" if early else ""
            print(f"{subject.run.id} ({mode}): scored already{note}", flush=True)
            return
        print(f"\n{subject.run.id} ({mode}): scoring on {name}", flush=True)
        started = time.perf_counter()
        model, tokenizer = subject.build()
        answered, samples = self._questions(subject, model, tokenizer)
        record = answered | {"heldout": self._heldout(model, tokenizer, beside=subject.cfg.quantized)}
        del model  # before another one is built
        if mode == "w8a8":
            record["calibrated"] = self._calibrated(subject)
        seconds = round(time.perf_counter() - started, 1)
        record |= {"asked": self._asked(subject), "of": self._of(subject), "by": runtime.summary(), "seconds": seconds}
        with subject.run.lock():
            if not subject.trained:
                subject.run.create(subject.cfg)
            subject.run.keep_sources(subject.cfg)
            results = subject.run.evaluations()
            if results.setdefault(name, {}).pop(mode, None):  # of other questions: its samples go first
                subject.run.write_json("eval.json", results)
            for task, rows in samples.items():
                subject.run.write_samples(name, mode, task, rows)
            results[name][mode] = record
            subject.run.write_json("eval.json", results)
        for task, row in record["tasks"].items():
            print(f"  {task}: {100 * row['score']:.1f} % of {row['n']} ({row['metric']}, {row['shots']} shots)")
        for name, text in record["heldout"].items():
            print(f"  held-out loss on {name}: {text['loss']:.4f} nats a token", flush=True)
        if subject.trained and not subject.cfg.quantized:  # a quantized run is mirrored with its comparison
            tracking.send(subject.run, subject.cfg)

    def _questions(self, subject: Subject, model: nn.Module, tokenizer) -> tuple[dict, dict[str, list[dict]]]:
        """(scores by task and lm-eval's version, samples by task to be written). Where only a text has changed, the
        answers that are there are still those to what is asked."""
        done, asked = self._done(subject), self._asked(subject)
        if done and all(done["asked"].get(key) == asked.get(key) for key in ("benchmark", "calibration_sequences")):
            return {key: done[key] for key in ("tasks", "lm_eval")}, {}
        limit = models.context(model.config)
        with runtime.attention_of_any_length():
            scores = benchmarks.score(model, tokenizer, self.cfg.benchmark, runtime.cache_dir(), limit, progress=True)
        return {"tasks": scores.tasks, "lm_eval": scores.lm_eval}, scores.samples

    def _heldout(self, model: nn.Module, tokenizer, beside: bool) -> dict[str, dict]:
        """By text never trained on: the data's own, and the one of another kind that training was probed with; beside
        the baseline's predictions or not."""
        cfg, wanted = self.cfg, self.cfg.budget.heldout_tokens
        texts = {cfg.data.name: data.heldout(cfg.data, tokenizer, wanted)}
        if cfg.probe:
            texts[cfg.probe.name] = data.heldout(cfg.probe, tokenizer, wanted // 2)
        return {name: self._losses(model, text, beside) for name, text in texts.items()}

    def _calibrated(self, subject: Subject) -> dict:
        """The held-out losses of a run's weights under the scales that PTQ gives them."""
        twin = Subject(ptq.calibrated(subject.cfg), subject.run, ptq_mode(subject.cfg.quant))
        return {"sequences": ptq.SEQUENCES, "heldout": self._heldout(*twin.build(), beside=False)}

    def _losses(self, model: nn.Module, text: data.Heldout, beside: bool) -> dict:
        """Loss on a text, and its KL divergence from the baseline's predictions: means over its documents."""
        batches = text.tokens.to(runtime.device()).split(_HELDOUT_BATCH)
        baseline = self._baseline if beside else None
        losses, divergence = [], []
        for batch in batches:
            ours = _log_probabilities(model, batch)
            labels = batch[:, 1:].unsqueeze(-1)
            losses += (-ours.gather(-1, labels).squeeze(-1).mean(1)).tolist()
            if baseline is not None:
                wanted = _log_probabilities(baseline, batch)
                kl = F.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1)
                divergence += kl.mean(1).tolist()
        losses, divergence = (_means(each, text.documents) for each in (losses, divergence))
        return {
            "loss": sum(losses) / len(losses),
            "document_losses": losses,
            "kl": sum(divergence) / len(divergence) if divergence else None,
            "tokens": text.tokens[:, 1:].numel(),
            "text_hash": text.hash,
        }


def _means(values: list[float], groups: torch.Tensor) -> list[float]:
    """The mean of the values, if any, of each group, in the order of their numbers."""
    if not values:
        return []
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, torch.tensor(values).double())
    return (sums / groups.bincount()).tolist()


@torch.inference_mode()
def _log_probabilities(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """int64 [sequences, length + 1] -> FP32 log-probabilities [sequences, length, vocabulary] of the next tokens."""
    return model(input_ids=tokens[:, :-1], use_cache=False).logits.float().log_softmax(-1)
