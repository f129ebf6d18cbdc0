"""Score a finished run: benchmarks through lm-eval, held-out loss, and KL divergence to the matched baseline.

Five things are scored for a quantized run: the pretrained checkpoint, the matched BF16 baseline, that baseline in W8A8
without QAT (`qat.quant.calibrate`), and the run both ways: its weights in BF16 without quantizers (`bf16`, what the
paper reports), and W8A8 with frozen scales (`w8a8`), whose held-out loss is also taken under PTQ's scales. Every model
is scored with its parameters in BF16, in the arithmetic that `qat.eval.arithmetic` names. Nothing is written into a
checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from qat.config import Config
from qat.data import heldout
from qat.eval import arithmetic, benchmarks
from qat.eval.subject import CALIBRATION_SEQUENCES, Subject, calibration_size, calibration_text
from qat.models.load import context_length
from qat.models.loss import has_plain_head
from qat.quant.ptq import Rung
from qat.runs import identity
from qat.runs.folder import Run
from qat.utils import device, environment

_HELDOUT_BATCH = 4  # sequences a forward call


def evaluate(cfg: Config) -> list[Subject]:
    """Score what `cfg` describes and what it is compared with, and return what was not scored already.

    Errors: as `score`.
    """
    baseline = identity.baseline_of(cfg)
    reference = Subject(baseline, Run.of(baseline), "bf16")
    subjects = [_pretrained(cfg), reference]
    if cfg.quantized:
        run = Run.of(cfg)
        subjects += [Subject(identity.ptq_of(cfg), reference.run, identity.ptq_mode(cfg.quant))]
        subjects += [Subject(cfg, run, "bf16"), Subject(cfg, run, "w8a8")]
    if cfg.benchmark.control:
        subjects += [Subject(baseline, reference.run, "control")]
    return score(cfg, reference, subjects)


def reference_of(cfg: Config) -> Subject:
    """Return what the ladder of PTQ methods is scored on and compared with: the model that `cfg.ptq.on` names."""
    baseline = identity.baseline_of(cfg)
    return _pretrained(cfg) if cfg.ptq.on == "pretrained" else Subject(baseline, Run.of(baseline), "bf16")


def _pretrained(cfg: Config) -> Subject:
    """Return the pretrained checkpoint. In records its scores on any text are named bf16."""
    pretrained, texts = identity.pretrained_of(cfg), identity.heldout_texts(cfg)
    run = Run.of(pretrained)
    recorded = run.evaluations().get(cfg.benchmark.name, {}).get("bf16", {}).get("request", {})
    is_recorded = all(recorded.get(key) == texts.get(key) for key in ("heldout", "validation"))
    return Subject(pretrained, run, "bf16" if is_recorded else identity.pretrained_mode(texts))


def rung_of(cfg: Config, rung: Rung) -> Subject:
    """Return a row of the ladder; cfg: a quantized run in the row's format.

    The row `max` of a baseline is the PTQ that the run is compared with, and shares its scores.
    """
    ptq, quantized, reference = cfg.ptq, identity.ptq_of(cfg), reference_of(cfg)
    unusual = {"method": rung.method, "number": rung.number} if rung.method != "max" else {}
    unusual |= {"sequences": ptq.sequences} if ptq.sequences else {}
    unusual |= {"tokens": ptq.tokens} if ptq.tokens else {}
    if not reference.trained:  # one folder for all texts and lengths
        unusual["text"] = calibration_text(cfg)
        quantized.budget.steps = 0
    mode, asked = identity.ptq_mode(quantized.quant, unusual), rung.name in ptq.questions
    return Subject(quantized, reference.run, mode, rung, unusual, asked)


def score(cfg: Config, reference: Subject, subjects: Sequence[Subject]) -> list[Subject]:
    """Score subjects on the benchmark and texts of `cfg`, and return what was not scored already.

    reference: the baseline whose predictions those of quantized ones are set beside.

    Raises:
        ConfigError: there are several ranks.
        UserError: a run is not finished, or its checkpoint is gone and something of it is not scored yet.
    """
    environment.refuse_ranks("evaluation")
    device.prepare()
    for subject in subjects:
        subject.check()
    scorer = _Scorer(cfg, reference)
    missing = [subject for subject in subjects if not scorer.scored(subject)]
    for subject in missing:  # all of them before minutes are spent on the first
        subject.check_checkpoint()
        if subject.compared:
            reference.check_checkpoint()
    for subject in subjects:
        scorer.score(subject)
    return missing


class _Scorer:
    """Scores subjects with one benchmark and the held-out texts, and writes the results to their folders."""

    def __init__(self, cfg: Config, reference: Subject):
        self.cfg, self.reference, self.arithmetic = cfg, reference, arithmetic.name(cfg)
        self._baseline: tuple[nn.Module, object] | None = None  # with its tokenizer, once it is built
        self._baseline_states: dict[tuple[str, int], torch.Tensor] = {}  # on the CPU: they can take gigabytes

    def scored(self, subject: Subject) -> bool:
        """Return whether its folder has the scores of these weights, for what is asked."""
        done = self._done(subject)
        # Recorded runs may lack losses under PTQ's scales, and no longer have the weights to take them.
        mixed = done.get("qat_weights_ptq_scales") or {"sequences": CALIBRATION_SEQUENCES}
        # What was scored before arithmetic had a name was scored as an export.
        unnamed = self.arithmetic if self.cfg.benchmark.arithmetic == "export" else None
        requests = [self._request(subject, asked) for asked in {subject.asked, True}]  # answers are more than was asked
        alike = done.get("arithmetic", unnamed) == self.arithmetic and done.get("request") in requests
        return alike and mixed["sequences"] == CALIBRATION_SEQUENCES

    def _done(self, subject: Subject, benchmark: str = "") -> dict:
        """Return what its folder has of these weights, by this benchmark or another one."""
        done = subject.run.evaluations().get(benchmark or self.cfg.benchmark.name, {}).get(subject.mode, {})
        return done if done.get("weights") == self._weights(subject) else {}

    def _weights(self, subject: Subject) -> list[str]:
        """Return the weights that a result is of, and those that it is compared with."""
        return [subject.run.fingerprint, *([self.reference.run.fingerprint] if subject.compared else [])]

    def _request(self, subject: Subject, asked: bool) -> dict:
        """Return what is asked of a subject: a result counts only for its own questions, text and calibration."""
        benchmark = dataclasses.asdict(self.cfg.benchmark)
        benchmark["tasks"] = benchmark["tasks"] if asked else {}
        del benchmark["arithmetic"], benchmark["control"]  # named beside it, as what it came to; another subject
        request = {"benchmark": benchmark} | identity.heldout_texts(self.cfg)
        request |= {"ptq": subject.unusual} if subject.unusual else {}
        return request | ({"calibration_sequences": calibration_size(subject.cfg)[0]} if subject.calibrated else {})

    def _build(self, subject: Subject) -> tuple[nn.Module, object]:
        """Return a model and its tokenizer; the baseline's are built once for all that is compared with it."""
        if subject is not self.reference:
            return subject.build()
        self._baseline = self._baseline or subject.build()
        return self._baseline

    def score(self, subject: Subject) -> None:
        name, mode = self.cfg.benchmark.name, subject.mode
        about = f"{mode}, {subject.rung.name}" if subject.unusual else mode
        if self.scored(subject):
            lacks = self._splits_gain(subject) and not self._done(subject).get("qat_weights_ptq_scales")
            note = ", without losses under PTQ's scales: to have them, delete its eval.json" if lacks else ""
            print(f"{subject.run.id} ({about}): scored already{note}", flush=True)
            return
        print(f"\n{subject.run.id} ({about}): scoring on {name}", flush=True)
        started = time.perf_counter()
        model, tokenizer = self._build(subject)
        answered, samples = self._questions(subject, model, tokenizer)
        taken = self._losses_by_other_benchmarks(subject)
        record = answered | {"heldout": self._heldout(model, tokenizer, subject.compared, taken)}
        del model  # before another one is built
        if mode == "w8a8":
            record["qat_weights_ptq_scales"] = self._under_ptq_scales(subject) if self._splits_gain(subject) else None
        seconds = round(time.perf_counter() - started, 1)
        record |= {
            "request": self._request(subject, subject.asked),
            "arithmetic": self.arithmetic,
            "weights": self._weights(subject),
            "scored_on": environment.machine_summary(),
            "seconds": seconds,
        } | ({"calibration_seconds": subject.calibration_seconds} if subject.calibrated else {})
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

    def _questions(self, subject: Subject, model: nn.Module, tokenizer) -> tuple[dict, dict[str, list[dict]]]:
        """Return (scores by task and lm-eval's version, samples by task). Where only a text is another one, the answers
        that are there are still those to what is asked."""
        if not (subject.asked and self.cfg.benchmark.tasks):
            return {"tasks": {}, "lm_eval": None}, {}
        name, request = self.cfg.benchmark.name, self._request(subject, asked=True)
        asked, pretrained = ("benchmark", "calibration_sequences"), not (subject.trained or subject.calibrated)
        for mode in subject.run.evaluations().get(name, {}) if pretrained else [subject.mode]:
            done = self._done(dataclasses.replace(subject, mode=mode))
            alike = [done.get("request", {}).get(key) == request.get(key) for key in asked]
            if done.get("arithmetic") == self.arithmetic and all(alike):
                samples = {task: subject.run.samples(name, mode, task) for task in done["tasks"]}
                return {key: done[key] for key in ("tasks", "lm_eval")}, samples
        limit = context_length(model.config)
        # Current scaling measures a whole batch, so what stands in it matters.
        alone = subject.mode != "w8a8" or self.cfg.scaling.algo != "current"
        how = {"progress": True, "share_prefixes": alone}
        with device.attention_of_any_length(), arithmetic.autocast(self.arithmetic):
            scores = benchmarks.score(model, tokenizer, self.cfg.benchmark, limit, **how)
        return {"tasks": scores.tasks, "lm_eval": scores.lm_eval}, scores.samples

    def _splits_gain(self, subject: Subject) -> bool:
        """Return whether what QAT gains is split into its weights and its scales: not where text alone is scored, which
        takes half as long without."""
        return subject.mode == "w8a8" and bool(self.cfg.benchmark.tasks)

    def _losses_by_other_benchmarks(self, subject: Subject) -> dict[str, dict]:
        """Return the losses that were taken on this machine, by the text's hash."""
        request, machine = self._request(subject, asked=False), environment.machine_summary()
        taken = {}
        for name in subject.run.evaluations():
            done = self._done(subject, name)
            alike = [done.get("request", {}).get(key) == request.get(key) for key in ("ptq", "calibration_sequences")]
            if all(alike) and (done.get("arithmetic"), done.get("scored_on")) == (self.arithmetic, machine):
                taken |= {losses["text_hash"]: losses for losses in done["heldout"].values()}
        return taken

    def _heldout(self, model: nn.Module, tokenizer, beside: bool, taken: Mapping[str, dict]) -> dict[str, dict]:
        """Return losses by text never trained on: the data's own, and `validation`, of another kind; beside the
        baseline's predictions or not. taken: those that are there, by the text's hash."""
        cfg, wanted = self.cfg, self.cfg.budget.heldout_tokens
        texts = {cfg.data.name: heldout.load_heldout(cfg.data, tokenizer, wanted)}
        if cfg.validation:
            wanted = cfg.validation.tokens or wanted // 2
            texts[cfg.validation.name] = heldout.load_heldout(cfg.validation, tokenizer, wanted)
        return {name: taken.get(text.hash) or self._losses(model, text, beside) for name, text in texts.items()}

    def _under_ptq_scales(self, subject: Subject) -> dict:
        """Return the held-out losses of a run's weights under the scales that PTQ gives them."""
        twin = Subject(identity.with_ptq_scales(subject.cfg), subject.run, identity.ptq_mode(subject.cfg.quant))
        return {"sequences": CALIBRATION_SEQUENCES, "heldout": self._heldout(*twin.build(), beside=False, taken={})}

    def _losses(self, model: nn.Module, text: heldout.Heldout, beside: bool) -> dict:
        """Return the loss on a text, and the KL divergence from the baseline's predictions: means over documents."""
        losses, divergence = [], []
        for start in range(0, len(text.tokens), _HELDOUT_BATCH):
            tokens = text.tokens[start : start + _HELDOUT_BATCH].to(device.get_device())
            ours = self._log_probabilities(model, self._states(model, tokens, (text.hash, start)))
            labels = tokens[:, 1:].unsqueeze(-1)
            losses += (-ours.gather(-1, labels).squeeze(-1).mean(1)).tolist()
            if beside:
                baseline, _ = self._build(self.reference)
                wanted = self._log_probabilities(baseline, self._states(baseline, tokens, (text.hash, start)))
                kl = F.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1)
                divergence += kl.mean(1).tolist()
        losses, divergence = (_means(values, text.documents) for values in (losses, divergence))
        return {
            "loss": sum(losses) / len(losses),
            "document_losses": losses,
            "kl": sum(divergence) / len(divergence) if divergence else None,
            "tokens": text.tokens[:, 1:].numel(),
            "text_hash": text.hash,
        }

    @torch.inference_mode()
    def _states(self, model: nn.Module, tokens: torch.Tensor, key: tuple[str, int]) -> torch.Tensor:
        """Return what the head reads, [sequences, length, width], for int64 tokens [sequences, length + 1]; of a model
        whose head is more than a product, its logits. Of the baseline they are made once for all that is compared."""
        is_baseline = self._baseline is not None and model is self._baseline[0] and has_plain_head(model)
        if is_baseline and key in self._baseline_states:
            return self._baseline_states[key].to(tokens.device)
        with arithmetic.autocast(self.arithmetic):
            if has_plain_head(model):
                states = model.get_decoder()(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            else:
                states = model(input_ids=tokens[:, :-1], use_cache=False).logits
        if is_baseline:
            self._baseline_states[key] = states.cpu()
        return states

    @torch.inference_mode()
    def _log_probabilities(self, model: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the next tokens, FP32 [sequences, length, vocabulary]."""
        with arithmetic.autocast(self.arithmetic):
            logits = model.get_output_embeddings()(states) if has_plain_head(model) else states
        return logits.float().log_softmax(-1)


def _means(values: list[float], groups: torch.Tensor) -> list[float]:
    """Return the mean of the values, if any, of each group, in the order of their numbers."""
    if not values:
        return []
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, torch.tensor(values).double())
    return (sums / groups.bincount()).tolist()
