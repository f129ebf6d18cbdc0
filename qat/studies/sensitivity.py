"""Measure where the damage of W8A8 sits: models in which a group of tensors is rounded alone, or is left out.

A group is a set of rounded tensors, weights or activations, of a block, a projection (`mlp.down_proj`), both, or all:

    alone      the model that rounds only the group, less the one that rounds nothing
    left out   the model that rounds everything, less the one that rounds all but the group

A group leaves the blocks before its first one as they are, so their outputs are computed once (`qat.models.blocks`).
What is measured is written after every unit of text or questions, and a second call goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from qat.analysis import sensitivity as analysis
from qat.config import BenchmarkConfig, Config, QuantConfig, TaskConfig
from qat.data import heldout
from qat.errors import ConfigError, UserError
from qat.eval import arithmetic, benchmarks
from qat.eval.subject import Subject, calibration_text
from qat.models.blocks import recorded, replayed
from qat.models.load import context_length, transformer_blocks
from qat.quant.convert import quantized_linears
from qat.quant.switches import only
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of, ptq_mode, ptq_of
from qat.studies import auto_quantize
from qat.utils import device, environment, files

LEVELS = {  # what tensors of a group have in common
    "role": ("role",),
    "block": ("block", "role"),
    "projection": ("projection", "role"),
    "linear": ("block", "projection", "role"),
}
# How text is measured, and questions are: what leaving out a single linear does, or to a question a block, is hidden by
# the noise of all that is rounded otherwise after it.
READ = dict.fromkeys(("role", "block", "projection"), analysis.WAYS) | {"linear": ("alone",)}
ASKED = {"role": analysis.WAYS, "block": ("alone",)}
_SEQUENCES = 4  # of text, a forward pass
_QUESTIONS = 8  # whose choices are a token each, a forward pass


class Tensor(NamedTuple):
    """Name a rounded tensor. projection: the linear in its block; of an input that linears share, all of these."""

    block: int
    projection: str
    role: str


class Group(NamedTuple):
    """Hold the tensors of a group, as indices in the bank, and the first block that has one."""

    tensors: frozenset[int]
    first: int


def tensors(model: nn.Module) -> dict[int, Tensor]:
    """Return the rounded weights and activations of a converted model by their index in the bank."""
    rounded: dict[int, Tensor] = {}
    for block, module in enumerate(transformer_blocks(model)):
        for name, linear in quantized_linears(module).items():
            for role in ("weight", "activation"):
                quantizer = linear.quantizers[role]
                if quantizer.enabled:
                    shared = rounded.get(quantizer.index)
                    projection = f"{shared.projection}+{name.rpartition('.')[2]}" if shared else name
                    rounded[quantizer.index] = Tensor(block, projection, role)
    return rounded


def groups(rounded: Mapping[int, Tensor], level: str) -> dict[str, Group]:
    """Return the groups of a level by name, as in "12/weight" for the weights of block 12."""
    members: dict[str, list[int]] = {}
    for index, tensor in rounded.items():
        members.setdefault("/".join(str(getattr(tensor, key)) for key in LEVELS[level]), []).append(index)
    return {name: _group(rounded, indices) for name, indices in members.items()}


def _group(rounded: Mapping[int, Tensor], indices: Sequence[int]) -> Group:
    return Group(frozenset(indices), min(rounded[index].block for index in indices))


# ------------------------------------------------------------------------------------------------ text and questions


class Piece(NamedTuple):
    """Hold what one forward pass reads, int64 [rows, length], and what it is to predict from its last positions.

    labels: int64 [rows or, of one row, choices, positions]. Rows of unlike lengths are padded on the right, where a
    causal model does not look; ends: their last positions, int64 [rows], and labels [rows, choices] are of these.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    ends: torch.Tensor | None = None


class Unit(NamedTuple):
    """Hold a few sequences of a text, or questions. facts: their documents, or the places of the right choices."""

    source: str
    pieces: list[Piece]
    facts: dict

    @property
    def key(self) -> str:
        """Name it by its tokens."""
        digest = hashlib.sha256()
        for tensor in filter(torch.is_tensor, itertools.chain.from_iterable(self.pieces)):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def size(self) -> int:
        return sum(piece.tokens.numel() for piece in self.pieces)


def of_text(source: str, tokens: torch.Tensor, documents: torch.Tensor) -> list[Unit]:
    """Return held-out sequences, int64 [sequences, length + 1], as units."""
    parts = zip(tokens.split(_SEQUENCES), documents.split(_SEQUENCES), strict=True)
    return [Unit(source, [Piece(t[:, :-1], t[:, 1:])], {"documents": d.tolist()}) for t, d in parts]


def of_questions(source: str, questions: Sequence[benchmarks.Question], max_length: int) -> list[Unit]:
    """Return questions as units: several of like length where the choices are a token each, else one."""
    letters: dict[int, list[benchmarks.Question]] = {}
    others = []
    for question in questions:
        short = all(len(choice) == 1 for choice in question.choices)
        (letters.setdefault(len(question.choices), []) if short else others).append(question)
    units = [of_question(source, question, max_length) for question in others]
    for alike in letters.values():
        alike.sort(key=lambda question: len(question.prompt))
        for start in range(0, len(alike), _QUESTIONS):
            batch = alike[start : start + _QUESTIONS]
            rows = [torch.tensor(question.prompt[-max_length:]) for question in batch]
            labels = torch.tensor([question.choices for question in batch])[..., 0]
            ends = torch.tensor([len(row) - 1 for row in rows])
            piece = Piece(nn.utils.rnn.pad_sequence(rows, batch_first=True), labels, ends)
            units.append(Unit(source, [piece], {"targets": [question.target for question in batch]}))
    return units


def of_question(source: str, question: benchmarks.Question, max_length: int) -> Unit:
    """Return a question as a unit: a pass for each choice, or one for several that differ in their last token alone."""
    rows = [([*question.prompt, *choice][:-1][-max_length:], choice) for choice in question.choices]
    pieces = [
        Piece(torch.tensor([tokens]), torch.tensor([choice for _, choice in alike]))
        for tokens, alike in itertools.groupby(rows, lambda row: row[0])
    ]
    return Unit(source, pieces, {"targets": [question.target]})


# -------------------------------------------------------------------------------------------------------- measuring


class Switchboard:
    """Measure a model in W8A8 with some of its tensors rounded. Weights, scales and bank stay as they are.

    rounded: its tensors. resumes: whether it can be run from a block on; else every pass is whole.
    """

    def __init__(self, model: nn.Module, how: str = "fp32"):
        self.model, self.how = model, how
        self.blocks, self.linears = transformer_blocks(model), list(quantized_linears(model).values())
        self.rounded = tensors(model)
        self.all = frozenset(self.rounded)
        self.resumes = True
        self.resumes = self._resumes_exactly()

    @torch.inference_mode()
    def _resumes_exactly(self) -> bool:
        piece = Piece(torch.arange(16)[None] % self.model.config.vocab_size, torch.zeros(1, 16))
        logits, outputs = self._whole(piece, self.all)
        half = len(self.blocks) // 2
        if len(outputs) != len(self.blocks):
            return False
        return torch.equal(logits, self._logits(piece, self.all, outputs[:half]))

    @torch.inference_mode()
    def measure(
        self, unit: Unit, chosen: Mapping[str, Group], ways: Sequence[str] = analysis.WAYS, advance=lambda cost: None
    ) -> dict:
        """Return what a unit gives: of each model and measure a list, by sequence or choice.

        {"unquantized", "quantized": {measure: values}, "alone", "left_out": {group: {measure: values}}}. Measures of
        text: loss, nats a token, and kl, from the unquantized model; of a question: logprobs of the choices.
        """
        results: dict = {"unquantized": {}, "quantized": {}} | {way: {name: {} for name in chosen} for way in ways}
        for piece in unit.pieces:
            plain, outputs = self._whole(piece, frozenset())
            full, rounded_outputs = self._whole(piece, self.all)
            read = _Reader(piece, plain, is_text="documents" in unit.facts)
            read(plain, results["unquantized"])
            read(full, results["quantized"])
            for name, group in chosen.items():
                for way in ways:
                    alone = way == "alone"
                    active = group.tensors if alone else self.all - group.tensors
                    known = (outputs if alone else rounded_outputs)[: group.first]
                    read(self._logits(piece, active, known), results[way][name])
                    advance(self.cost(piece.tokens.numel(), group))
        return results

    def cost(self, tokens: int, group: Group) -> float:
        """Return the work of a pass, as that of so many tokens through all blocks."""
        return tokens * (1 - group.first / len(self.blocks) if self.resumes else 1)

    def _whole(self, piece: Piece, active: frozenset[int]) -> tuple[torch.Tensor, list]:
        with recorded(self.blocks) as outputs:
            logits = self._logits(piece, active, [])
        return logits, outputs

    def _logits(self, piece: Piece, active: frozenset[int], known: Sequence) -> torch.Tensor:
        """Return the logits at the last positions, FP32 [rows, positions, vocabulary]; known: outputs of the first
        blocks."""
        known = known if self.resumes else []
        with only(self.linears, active), replayed(self.blocks[: len(known)], known), arithmetic.autocast(self.how):
            tokens, keep = device.to_device(piece.tokens), piece.labels.shape[1]
            if piece.ends is not None:
                keep, places = device.to_device(piece.ends).unique(return_inverse=True)
            with device.attention_of_any_length():
                logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits
        if piece.ends is not None:
            logits = logits[torch.arange(len(tokens)), places].unsqueeze(1)
        return logits.float()


class _Reader:
    """Turn logits into values, beside those of the unquantized model."""

    def __init__(self, piece: Piece, plain: torch.Tensor, is_text: bool):
        self.labels, self.is_text, self.padded = device.to_device(piece.labels), is_text, piece.ends is not None
        if is_text:
            logprobs = plain.log_softmax(-1)
            self.shares = logprobs.exp()
            self.entropy = self._cross(logprobs)

    def _cross(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy with the unquantized model's shares, [rows, positions]."""
        return -torch.einsum("rpv,rpv->rp", self.shares, logprobs)

    def __call__(self, logits: torch.Tensor, values: dict[str, list[float]]) -> None:
        """Add what the logits give to `values`."""
        logprobs = logits.log_softmax(-1)
        if self.padded:
            chosen = logprobs[:, 0].gather(-1, self.labels).reshape(-1, 1)
        else:
            chosen = logprobs.expand(len(self.labels), -1, -1).gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)
        new = {"logprobs": chosen.sum(1)}
        if self.is_text:
            new = {"loss": -chosen.mean(1), "kl": (self._cross(logprobs) - self.entropy).mean(1)}
        for measure, numbers in new.items():
            values.setdefault(measure, []).extend(round(number, 7) for number in numbers.tolist())


# --------------------------------------------------------------------------------------------------------- the study


def subject(cfg: Config, quant: QuantConfig) -> Subject:
    """Return the model whose damage is measured: a run in W8A8 with its own scales; of a BF16 run or the pretrained
    checkpoint, its weights by PTQ under `quant`. Errors: ConfigError where nothing is rounded, or single tensors cannot
    be."""
    environment.refuse_ranks("sensitivity")
    of = {"run": lambda cfg: cfg, "baseline": baseline_of, "pretrained": pretrained_of}[cfg.sensitivity.of](cfg)
    quant = of.quant if of.quantized else quant
    if quant.format == "none" or not (quant.weights or quant.activations):
        raise ConfigError(
            f"quant.format={quant.format}: nothing is rounded, so there is no damage; name a quantized recipe"
        )
    if quant.gemm == "fp8":
        raise ConfigError("quant.gemm=fp8: single operands cannot be left unrounded; name a run with quant.gemm=bf16")
    if of.quantized:
        return Subject(of, Run.of(of), "w8a8")
    return Subject(ptq_of(dataclasses.replace(of, quant=quant)), Run.of(of), ptq_mode(quant))


def folder_name(measured_of: Subject) -> str:
    """Return the name of the folder that its measurements and page are in."""
    return measured_of.run.id + (f"-{measured_of.mode}" if measured_of.calibrated else "")


class Study:
    """Measure a subject on held-out texts and questions, and keep what is measured in `folder`/sensitivity.json."""

    def __init__(self, cfg: Config, measured_of: Subject, folder: Path):
        self.cfg, self.subject, self.path = cfg, measured_of, folder / "sensitivity.json"
        self.texts = [text for text in (cfg.data, cfg.validation) if text]
        asked = cfg.sensitivity
        self.request = {
            "run": measured_of.run.id,
            "mode": measured_of.mode,
            "weights": measured_of.run.fingerprint,
            "arithmetic": arithmetic.name(cfg),
            "calibration": calibration_text(measured_of.cfg) if measured_of.calibrated else None,
            "texts": [[text.path, text.subset, text.revision] for text in self.texts],
            "asked": [asked.tokens, asked.task, asked.questions, _QUESTIONS],
        }
        self.content = self._before()

    def _before(self) -> dict:
        """Return what the folder holds of this very request; another one starts anew: it splits documents otherwise."""
        empty = {"request": self.request, "seconds": 0.0, "tensors": [], "measured": {}}
        if not self.path.exists():
            return empty
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return content if content["request"] == self.request else empty
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it, and measure again") from error

    def measure(self) -> dict:
        """Measure what is missing; returns all that is measured."""
        device.prepare()
        model, tokenizer = self.subject.build()
        board = Switchboard(model, self.request["arithmetic"])
        self.content["tensors"] = [list(tensor) for tensor in board.rounded.values()]
        texts, fresh = self._texts(tokenizer)
        questions = self._questions(model, tokenizer)
        work = [
            (level, unit, groups(board.rounded, level), ways)
            for level in self.cfg.sensitivity.groups
            for units, ways in ((texts, READ[level]), (questions if level in ASKED else [], ASKED.get(level)))
            for unit in units
        ]
        self._do(board, work)
        if "block" in self.cfg.sensitivity.groups:
            self._check_choices(board, texts, fresh)
        return self.content

    def _check_choices(self, board: Switchboard, texts: Sequence[Unit], fresh: Sequence[Unit]) -> None:
        """Measure what is left of the damage with some blocks in BF16, and ask Model-Optimizer about all of them."""
        chosen = {}
        for blocks in analysis.first_choices(self.content):
            members = [index for index, tensor in board.rounded.items() if tensor.block in blocks]
            chosen[",".join(map(str, blocks))] = _group(board.rounded, members)
        self._do(board, [("kept", unit, chosen, ("left_out",)) for unit in fresh])
        if not isinstance(self.content.get("auto_quantize"), dict):  # what failed is tried again
            places = {id(module): block for block, parent in enumerate(board.blocks) for module in parent.modules()}
            rounded = {name: places[id(linear)] for name, linear in quantized_linears(board.model).items()}
            plain = dataclasses.replace(self.subject, mode="bf16")
            batches = [tuple(map(device.to_device, unit.pieces[0][:2])) for unit in texts]
            self.content["auto_quantize"] = auto_quantize.scores(plain, rounded, batches)
            self._write()

    def _texts(self, tokenizer) -> tuple[list[Unit], list[Unit]]:
        """Return the units of the held-out texts: half of the documents to measure, the others to check a choice on."""
        measured, fresh = [], []
        for text in self.texts:
            held = heldout.load_heldout(text, tokenizer, 2 * self.cfg.sensitivity.tokens)
            first = held.documents < -(-len(held.documents.unique()) // 2)
            for units, rows in ((measured, first), (fresh, ~first)):
                units += of_text(text.name, held.tokens[rows], held.documents[rows]) if rows.any() else []
        return measured, fresh

    def _questions(self, model: nn.Module, tokenizer) -> list[Unit]:
        asked, limit = self.cfg.sensitivity, context_length(model.config)
        if not asked.questions:
            return []
        task = BenchmarkConfig(name="sensitivity", tasks={asked.task: TaskConfig(limit=asked.questions)})
        questions = benchmarks.tokenized(model, tokenizer, task, limit)[asked.task]
        if self.subject.cfg.scaling.algo == "current":  # which scales by all that is read together
            return [of_question(asked.task, question, limit) for question in questions]
        return of_questions(asked.task, questions, limit)

    def _do(self, board: Switchboard, work: Sequence[tuple]) -> None:
        measured = self.content["measured"]
        work = [
            (level, unit, chosen, ways)
            for level, unit, chosen, ways in work
            if set(chosen) - set(measured.get(level, {}).get(unit.source, {}).get(unit.key, {}).get(ways[-1], {}))
        ]
        cost = sum(len(ways) * board.cost(unit.size, g) for _, unit, chosen, ways in work for g in chosen.values())
        with tqdm(total=round(cost), desc="Running models", unit="token", unit_scale=True, mininterval=1) as bar:
            for level, unit, chosen, ways in work:
                started = time.perf_counter()
                values = board.measure(unit, chosen, ways, bar.update)
                units = measured.setdefault(level, {}).setdefault(unit.source, {})
                units[unit.key] = unit.facts | values
                self.content["seconds"] += round(time.perf_counter() - started, 1)
                self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(self.path, json.dumps(self.content))
