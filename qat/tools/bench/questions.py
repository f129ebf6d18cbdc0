"""Benchmark questions as scored here, their shared prompts encoded once, beside lm-eval's own path."""

from __future__ import annotations

from collections.abc import Callable

from qat.config import Config
from qat.eval import arithmetic, benchmarks
from qat.models.load import context_length, load_model
from qat.tools.bench import timing
from qat.utils import device

# As papers ask (conf/benchmark/paper.yaml), and without examples.
TASKS = (
    ("mmlu", 5),
    ("hellaswag", 10),
    ("arc_easy", 25),
    ("arc_challenge", 25),
    ("mmlu_continuation", 0),
    ("arc_easy", 0),
)
QUESTIONS = 8  # of MMLU, of one subject


def speedups(cfg: Config) -> dict[str, tuple[float, float, float]]:
    """Return {task and shots: how many times as fast as lm-eval's `HFLM`; median, smallest and largest over rounds}."""
    model, tokenizer = load_model(cfg.model, cfg.seed)
    how = arithmetic.name(cfg)
    arithmetic.store(model.eval(), how)
    ratios = {}
    for name, shots in TASKS:
        print(f"measuring questions of {name} with {shots} examples", flush=True)
        works = _works(cfg, model, tokenizer, name, shots)
        with arithmetic.autocast(how), device.attention_of_any_length():
            times = timing.in_turn(works, cfg.bench.rounds, warmup=1)
        ratios[f"{name}, {shots} examples"] = timing.ratio(times, "lm-eval", "shared")
    return ratios


def _works(cfg: Config, model, tokenizer, name: str, shots: int) -> dict[str, Callable[[], object]]:
    from lm_eval.models.huggingface import HFLM

    from qat.eval.language_model import LanguageModel

    limit, batch = context_length(model.config), cfg.benchmark.batch_size
    requests = benchmarks.requests(name, shots, QUESTIONS)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=limit)
    shared = LanguageModel(model, tokenizer, batch, limit)
    return {
        name: lambda lm=lm: lm.loglikelihood(requests, True) for name, lm in (("lm-eval", plain), ("shared", shared))
    }
