"""Run the benchmark: measure everything in turn and write one table, with hardware and versions."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from qat.config import Config
from qat.errors import ConfigError, nearest
from qat.models.load import load_model
from qat.quant.kernels import dispatch
from qat.quant.scaling import ScaleBank
from qat.report.text import markdown
from qat.runs.folder import Run
from qat.tools.bench import products, questions, steps, timing
from qat.tools.flops import model_shape, product_flops
from qat.train.shadow import Shadow
from qat.utils.device import get_device, prepare, resolve_arithmetic
from qat.utils.environment import commit_name, describe_environment, hardware_name

# Elements of a tensor that fits no cache, and on a GPU keeps a kernel busy for longer than its launch takes.
_ELEMENTS = {"cpu": 2**24, "cuda": 2**29}


@dataclass
class Row:
    """A measured ratio: its name; median, smallest and largest value over the rounds; the target."""

    what: str
    median: float
    low: float
    high: float
    target: str = ""
    note: str = ""


def measure(cfg: Config) -> Path:
    """Run the benchmark and write `bench.md` and `bench.json` to the folder `cfg.bench.out`; returns the former."""
    # Memory before steps: what steps leave in a GPU's cache would not be counted.
    parts = {"kernels": _kernel_rows, "memory": _memory_rows, "steps": _step_rows}
    parts |= {"questions": _question_rows, "products": _product_rows}
    for part in cfg.bench.parts:
        if part not in parts:
            raise ConfigError(f"bench.parts={part}: unknown part; {nearest(part, parts)}")
    steps.check(cfg)
    if "products" in cfg.bench.parts:
        products.check()
    prepare()
    out = Path(cfg.bench.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in filter(cfg.bench.parts.__contains__, parts):
        rows += parts[part](cfg)
        gc.collect()
        torch.cuda.empty_cache()
    facts = _facts(cfg)
    (out / "bench.json").write_text(
        json.dumps({"facts": facts, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
    )
    page = out / "bench.md"
    page.write_text(_page(rows, facts))
    print(page.read_text())
    return page


def _say(what: str) -> None:
    print(f"measuring {what}", flush=True)


# Kernels ------------------------------------------------------------------------------------------------------


def _kernel_rows(cfg: Config) -> list[Row]:
    """Measure the bandwidth of rounding kernels, over the bytes that they must read and write, against a copy's."""
    device, rows = get_device(), []
    for dtype in (torch.bfloat16, torch.float32):
        _say(f"kernels, {dtype}")
        x = torch.randn(_ELEMENTS[device.type], device=device, dtype=dtype)
        works, moved = _kernel_works(x)
        times = timing.in_turn(works, 5 * cfg.bench.rounds, repeats=20 if x.is_cuda else 1)
        target = ">= 0.85" if x.is_cuda else ">= 0.5"
        speed = moved["copy"] / statistics.median(times["copy"]) / 1e9
        for name in list(works)[1:]:
            shares = [1 / r for r in timing.ratio(times, name, "copy")]
            scaled = [share * moved[name] / moved["copy"] for share in (shares[0], shares[2], shares[1])]
            required = target if name == "round, amax" and (dtype is torch.bfloat16) == x.is_cuda else ""
            what = f"kernel: {name}, {str(dtype).removeprefix('torch.')}: share of copy bandwidth"
            rows.append(Row(what, *scaled, required, f"copy: {speed:.1f} GB/s"))
    return rows


def _kernel_works(x: torch.Tensor):
    """Return (works, bytes that each work moves) for one tensor."""
    scale, out = torch.tensor(3.0, device=x.device), torch.empty_like(x)
    slot = torch.zeros(1, device=x.device)
    codes = torch.randint(256, x.shape, dtype=torch.uint8, device=x.device)

    def rounding(output: str):
        return lambda: dispatch.quantize(x, scale, slot, "hif8", "clip", 15.0, output)

    size = x.element_size() * x.numel()
    works = {
        "copy": lambda: out.copy_(x),
        "round, amax": rounding("values"),
        "round, amax, codes": rounding("codes"),
        "decode": lambda: dispatch.decode(codes, "hif8", x.dtype),
    }
    return works, dict(zip(works, (2 * size, 2 * size, 2 * size + x.numel(), size + x.numel()), strict=True))


# Steps --------------------------------------------------------------------------------------------------------


def _step_rows(cfg: Config) -> list[Row]:
    model, _ = load_model(cfg.model, cfg.seed)
    made = steps.Steps(cfg, model)
    _say("training steps")
    times = timing.in_turn(made.works(), cfg.bench.rounds)
    per_step = made.batch[:, 1:].numel()
    rows = []
    for name, seconds in times.items():
        speed = per_step / statistics.median(seconds)
        note = f"{speed:,.0f} tokens/s"
        if name == "bf16":
            note += _utilization(made, speed)
        rows.append(Row(f"step: {name} : bf16", *timing.ratio(times, name, "bf16"), _step_target(name), note))
    if {"all", "all, current scaling"} <= times.keys():
        rows.append(Row("step: delayed : current scaling", *timing.ratio(times, "all", "all, current scaling")))
    if "all" in times:
        rows += [*_tick_rows(cfg, made, times["all"]), _shadow_row(cfg, made)]
        _say("evaluation")
        evaluated = timing.in_turn(made.evaluations(), cfg.bench.rounds)
        rows.append(Row("evaluation: W8A8, all : bf16", *timing.ratio(evaluated, "all", "bf16"), "<= 1.08"))
    return rows


def _step_target(name: str) -> str:
    if get_device().type == "cpu":
        return {"mlp": "<= 1.10", "all": "<= 1.20"}.get(name, "")
    return {"mlp": "<= 1.03", "all": "<= 1.06", "all, fp8 products": "<= 0.95"}.get(name, "")


def _utilization(made: steps.Steps, tokens_per_second: float) -> str:
    """Return the FLOP/s of the BF16 step, as a share of those of a large product measured in the step's arithmetic."""
    size = 8192 if torch.cuda.is_available() else 2048
    peak = product_flops(size, made.trainers["bf16"].arithmetic)
    return f", {_flops(made) * tokens_per_second / peak:.0%} of a {size}^3 product's FLOP/s"


def _flops(made: steps.Steps) -> float:
    """Return the FLOPs of a token's BF16 step."""
    shape, _ = model_shape(made.trainers["bf16"].model.config, made.cfg)
    return shape.flops(made.cfg.budget.seq_len)


def _tick_rows(cfg: Config, made: steps.Steps, step_seconds: list[float]) -> list[Row]:
    """Measure a tick of 546 tensors (all linears of 26 blocks, three roles), and writing their amaxes, against a step.

    The window is 64.
    """
    quantized, names = made.trainers["all"].cfg, [f"{i}/weight" for i in range(546)]
    bank = ScaleBank(names, [15.0] * 546, quantized.scaling, device=get_device())
    bank.begin_step(1, 1)
    step, rows = statistics.median(step_seconds), []
    with tempfile.TemporaryDirectory() as folder, Run(folder).traced(names, 1) as write:
        works = {"tick": bank.tick, "amax trace": lambda: write(1, bank.targets.cpu().numpy())}
        for name, work in works.items():
            times = [timing.seconds(work, repeats=10) / step for _ in range(5 * cfg.bench.rounds)]
            what = f"{name} of 546 tensors : step, all linears"
            rows.append(Row(what, statistics.median(times), min(times), max(times), "<= 0.005"))
    return rows


def _shadow_row(cfg: Config, made: steps.Steps) -> Row:
    """Measure what a step with `scaling.shadow` of one rule takes longer: passes under it and without quantization."""
    _say("shadow")
    trainer, works = made.trainers["all"], made.works()
    tried = copy.deepcopy(trainer.cfg)
    tried.scaling.shadow = ["most_recent"]
    shadow = Shadow(trainer, tried, Run.of(cfg), done=0)
    shadow.tick(1, trainer.step(2, [made.batch]))
    works = {"step": works["all"], "shadow": lambda: shadow.rows(2, [made.batch])}
    ratios = timing.ratio(timing.in_turn(works, cfg.bench.rounds), "shadow", "step")
    return Row("shadow of one rule : step, all linears", *ratios)


# Memory -------------------------------------------------------------------------------------------------------


def _memory_rows(cfg: Config) -> list[Row]:
    peaks = {}
    for name, config in steps.settings(cfg).items():
        _say(f"peak memory, {name}")
        peaks[name] = timing.peak_memory(steps.one_model_alone, config)
    rows = []
    for name, peak in peaks.items():
        if name != "bf16":
            share = peak / peaks["bf16"]
            note = f"{peak / 2**30:.2f} : {peaks['bf16'] / 2**30:.2f} GiB"
            rows.append(Row(f"peak memory: {name} : bf16", share, share, share, "<= 1.00", note))
    return rows


# Questions ----------------------------------------------------------------------------------------------------


def _question_rows(cfg: Config) -> list[Row]:
    rows = []
    for what, ratios in questions.speedups(cfg).items():
        target = ">= 1" if what.endswith(" 0 examples") else ">= 3"
        rows.append(Row(f"questions: {what}: lm-eval : prompts shared", *ratios, target))
    return rows


# Products of quant.gemm=fp8 -------------------------------------------------------------------------------------


def _product_rows(_: Config) -> list[Row]:
    rows = []
    for length in products.LENGTHS:
        for operands, spread in (("normal", 0.0), ("heavy-tailed", 2.0)):
            _say(f"products of {length} terms, {operands}")
            for how, error in products.errors(length, spread).items():
                rows.append(Row(f"product error: {length} terms, {operands}: {how}", error, error, error))
    return rows


# Page ---------------------------------------------------------------------------------------------------------


def _facts(cfg: Config) -> dict[str, str]:
    machine = describe_environment()
    return {
        "hardware": hardware_name(machine),
        "arithmetic": resolve_arithmetic(cfg.budget.arithmetic),
        "compiled": str(cfg.budget.compile).lower(),
        "model": cfg.model.name,
        "batch": f"{cfg.batch[0]} x {cfg.budget.seq_len} tokens",
        "rounds": str(cfg.bench.rounds),
        "versions": ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
        "code": commit_name(machine["git"]),
        "command": f"python {machine['command']}",
    }


def _page(rows: list[Row], facts: dict[str, str]) -> str:
    cells = []
    for row in rows:
        spread = f" [{row.low:.3g}, {row.high:.3g}]" if row.low != row.high else ""
        cells.append([row.what, f"{row.median:.3g}{spread}", row.target, row.note])
    about = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    intro = "Ratios of things run in turn in one process: median over the rounds [smallest, largest]."
    return f"# Benchmark\n\n{intro}\n\n{about}\n{markdown(['what', 'ratio', 'target', 'note'], cells)}\n"
