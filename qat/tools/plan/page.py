"""Write a plan as a page of text: every estimate with what it is derived from, and at the end what is missing here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator

from qat.cli.preflight import checkpoint_bytes, from_hub
from qat.tools.plan import communication, costs, memory
from qat.tools.plan.machine import needs_hub
from qat.tools.plan.plan import Plan, Training

_LABEL, _WIDTH = 24, 116  # characters: of a label, of a line
_USEFUL_PASSES = 4  # up to which repeated text is worth about as much as new text (arXiv 2305.16264)
_GPUS = (24e9, 48e9, 80e9, 141e9, 192e9)  # bytes that data-centre GPUs have


def page(plan: Plan) -> str:
    """Return the whole page, its lines wrapped."""
    sections = [_run, _model, _text]
    if plan.shape is not None:
        sections += [_memory, _time]
        if plan.ranks > 1:
            sections.append(_communication)
    sections += [_evaluation, _disk, _downloads, _licences, _missing]
    lines = (line for section in sections for line in section(plan))
    return "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent=" " * (_LABEL + 2)) for line in lines)


def size(count: float) -> str:
    """Return a number of bytes in a unit that suits; 1 GB is 10^9."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count:.0f} bytes"


def count(number: float) -> str:
    for unit, one in (("billion", 1e9), ("million", 1e6)):
        if number >= one:
            return f"{number / one:.3g} {unit}"
    return f"{number:,.0f}"


def duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.3g} days"
    return f"{hours:.2g} h" if hours >= 1 else f"{60 * hours:.2g} min"


def span(low: float, high: float, write: Callable[[float], str]) -> str:
    return write(low) if write(low) == write(high) else f"{write(low)} to {write(high)}"


def _row(label: str, value: str, basis: str = "") -> str:
    """Return a labelled value, and in brackets what it is derived from."""
    return f"  {label:<{_LABEL}}{value}{f'  ({basis})' if basis else ''}"


def _run(plan: Plan) -> Iterator[str]:
    cfg = plan.cfg
    where = f"{plan.ranks} x {plan.machine.gpu or 'GPU'}" if plan.on_gpus else plan.machine.name
    what = f"{cfg.experiment or 'run'}: budget={cfg.budget.name} protocol={cfg.protocol} on {where}"
    yield f"{what}, {cfg.budget.arithmetic.upper()} arithmetic{', compiled' if cfg.budget.compile else ''}"
    for training in plan.trainings:
        label = "baseline" if cfg.quantized and not training.quantized else "run"
        done = f"{training.done} of {cfg.steps} steps done here" if training.done else f"{cfg.steps} steps"
        yield _row(label, training.id, done)


def _model(plan: Plan) -> Iterator[str]:
    name = plan.cfg.model.name
    yield ""
    if plan.shape is None:
        yield f"model {name}: sizes unknown"
        yield f"  {plan.unknown}"
    else:
        yield f"model {name}: {count(plan.shape.parameters)} parameters ({plan.source})"
        yield from str(plan.coverage).split("\n")


def _text(plan: Plan) -> Iterator[str]:
    cfg = plan.cfg
    step, run = costs.tokens(cfg)
    micro, accumulation = cfg.batch
    yield ""
    yield f"text {cfg.data.name}"
    yield _row("a step", f"{step:,} tokens", f"{micro} x {cfg.budget.seq_len}, {accumulation} times")
    yield _row("the run", f"{count(run)} tokens", f"{cfg.steps:,} steps")
    known = costs.text(cfg)
    if known is None:
        yield _row("the text", "size unknown")
        return
    tokens, _, basis = known
    passes = run / tokens
    share = f"read {passes:,.1f} times" if passes >= 0.95 else f"of which {passes:.2g} is read"
    yield _row("the text", f"{count(tokens)} tokens, {share}", basis)
    if passes > _USEFUL_PASSES:
        yield _row("", f"CAUTION: beyond {_USEFUL_PASSES} passes, repeated text teaches less and less")


def _memory(plan: Plan) -> Iterator[str]:
    baseline, run = plan.trainings[0].memory, plan.trainings[-1].memory
    how = "" if plan.ranks == 1 else f", budget.parallel={plan.cfg.budget.parallel}"
    yield ""
    yield f"memory of each of {plan.ranks} {'GPU' if plan.on_gpus else 'process'}(s){how}"
    for part in run:
        value, before = size(run[part]), size(baseline.get(part, 0))
        yield _row(part, value if value == before else f"{value}  (baseline {before})")
    total, before = sum(run.values()), sum(baseline.values())
    basis = f"an eager step, traced; right within {memory.ERROR:.0%} on CPUs, not measured on GPUs"
    yield _row("together", f"{size(total)}  (baseline {size(before)})", basis)
    if plan.on_gpus:
        need = max(total, before) / (1 - memory.ERROR)
        enough = next((f"{gpu / 1e9:.0f} GB" for gpu in _GPUS if gpu >= need), "none of one GPU")
        less = "" if plan.cfg.budget.activation_checkpointing else "budget.activation_checkpointing=true, "
        less += "a smaller budget.micro_batch at more accumulation, or a smaller budget.largest_logits"
        yield _row("a GPU that holds it", f"{enough}, with {memory.ERROR:.0%} to spare; less with {less}")
        if plan.cfg.budget.name == "paper":
            yield _row("", f"the paper's GPUs have 80 GB: {'it fits' if need <= 80e9 else 'IT DOES NOT FIT'}")


def _time(plan: Plan) -> Iterator[str]:
    yield ""
    yield f"training time on {plan.ranks} rank(s), taken to scale without loss"
    for training in plan.trainings:
        yield from _rates(plan, training)
    lows, highs = zip(*(_hours_left(plan, training) for training in plan.trainings), strict=True)
    gpu_hours = ""
    if plan.on_gpus:
        gpu_hours = span(plan.ranks * sum(lows), plan.ranks * sum(highs), lambda hours: f"{hours:,.1f}") + " GPU hours"
    yield _row("together", span(sum(lows), sum(highs), duration), gpu_hours)


def _hours_left(plan: Plan, training: Training) -> tuple[float, float]:
    step, _ = costs.tokens(plan.cfg)
    return training.hours(step * (plan.cfg.steps - training.done) * plan.lengthened(training), plan.ranks)


def _rates(plan: Plan, training: Training) -> Iterator[str]:
    name = plan.cfg.quant.format if training.quantized else "bf16"
    first, *others = training.rates
    rate = span(first.low, first.high, lambda r: f"{r:,.0f}")
    yield _row(name, f"{span(*_hours_left(plan, training), duration)}, {rate} tokens/s a rank")
    yield _row("", first.basis)
    if plan.lengthened(training) > 1:
        every = f"scaling.shadow: every {plan.cfg.budget.telemetry_every} steps {len(plan.cfg.scaling.shadow)} rules"
        yield _row("", f"steps {plan.lengthened(training):.2f} times as long ({every} and a pass without quantization)")
    for other in others:
        rate = span(other.low, other.high, lambda r: f"{r:,.0f}")
        yield _row("", f"for comparison {rate}: {other.basis}")


def _communication(plan: Plan) -> Iterator[str]:
    traffic = communication.of_step(plan.shape, plan.cfg, plan.ranks, plan.cfg.batch[1] // plan.ranks)
    sent, calls = sum(part.sent(plan.ranks) for part in traffic), sum(part.calls for part in traffic)
    yield _row("sent by each rank", f"{size(sent)} a step, in {calls} calls", "collectives as rings; no time counted")


def _evaluation(plan: Plan) -> Iterator[str]:
    questions, tokens = costs.questions(plan.cfg)
    heldout = costs.heldout(plan.cfg)
    yield ""
    yield f"evaluation: benchmark={plan.cfg.benchmark.name}, one process, {plan.scored} models"
    basis = "from samples; choices and examples counted"
    yield _row("questions", f"{questions:,}, {count(tokens)} tokens a model", basis)
    by_ptq = ", one under PTQ's scales" if plan.passes > plan.scored else ""
    yield _row("held-out text", f"{count(heldout)} tokens, {plan.passes} passes", f"one a model{by_ptq}")
    if plan.shape is not None:
        low, high = plan.trainings[0].hours(plan.scored * tokens + plan.passes * heldout, 1)
        share = (costs.DISTILLED if plan.cfg.loss.distill else 1) / 3
        basis = "a forward pass as a third of a BF16 step; short prompts are slower"
        yield _row("time", span(share * low, share * high, duration), basis)


def _disk(plan: Plan) -> Iterator[str]:
    cfg = plan.cfg
    yield ""
    yield f"disk ({cfg.runs_dir}: {size(plan.machine.runs_free)} free)"
    if plan.shape is not None:
        most, final = checkpoint_bytes(cfg, plan.shape.parameters)
        value = f"{size(most)} while a run trains, {size(final)} of each that is finished"
        weight = cfg.optim.weight_bytes
        basis = f"{weight + cfg.optim.moment_bytes} and {weight} bytes a parameter; two kept and one being written, "
        basis += f"every {cfg.budget.checkpoint_every} steps"
        yield _row("checkpoints", value, basis)
        tensors = 3 * len(plan.coverage.linears)
        basis = f"{tensors} tensors at most, every {cfg.budget.telemetry_every} steps"
        yield _row("metrics, telemetry", size(costs.rows(cfg, tensors)), basis)
        cached = costs.cached_tokens(cfg, plan.shape)
        if cached:
            yield _row("token cache", size(cached), "in $HIF8_CACHE, shared by all runs")
    yield _row("samples", size(costs.samples(cfg, plan.scored)), f"of {plan.scored} models")


def _downloads(plan: Plan) -> Iterator[str]:
    cfg = plan.cfg
    yield ""
    yield "downloads, where nothing is cached yet"
    if from_hub(cfg.model):
        weights = size(2 * plan.shape.parameters) if plan.shape else "size unknown"
        pinned = "" if cfg.model.revision else "; model.revision is not pinned"
        yield _row("model", f"{cfg.model.path}: {weights}", f"BF16{pinned}")
    if from_hub(cfg.data):
        known = costs.text(cfg)
        _, run = costs.tokens(cfg)
        if known:
            tokens, whole, _ = known
            value = f"up to {size(whole * min(1, run / tokens))}"
            basis = f"the share read of {size(whole)}; only its text column"
        else:
            value, basis = f"about {size(run * costs.CHARACTERS)}", "uncompressed; size not known"
        yield _row("text", f"{cfg.data.path}: {value}", basis)
    if cfg.data.source == "prepared":
        yield _row("text", "52 MB", "documentation packages of Debian 12, for `make text`")
    yield _row("benchmarks", "nothing: they are in a package")


def _licences(plan: Plan) -> Iterator[str]:
    cfg = plan.cfg
    yield ""
    yield "licences"
    yield _row("model", cfg.model.licence)
    for label, text in (("text", cfg.data), ("validation", cfg.validation)):
        if text:
            yield _row(label, costs.DATA_LICENCES.get(text.path, "unknown; see its card"))
    yield _row("benchmarks", "MMLU and HellaSwag MIT, ARC CC BY-SA 4.0")


def _missing(plan: Plan) -> Iterator[str]:
    yield ""
    yield from (f"missing here: {what}" for what in missing(plan) or ["nothing"])


def missing(plan: Plan) -> list[str]:
    """Return what this machine lacks of what the plan needs."""
    cfg, machine, lacking = plan.cfg, plan.machine, []
    if plan.on_gpus and machine.gpus < plan.ranks:
        lacking.append(f"{plan.ranks} GPU(s): this machine has {machine.gpus}")
    lacking += _missing_memory_and_disk(plan) if plan.shape is not None else ["the model's config.json"]
    lacking += machine.problems
    if cfg.data.source == "prepared" and cfg.data.revision is None:
        lacking.append(f"the text {cfg.data.name}, by whose revision runs are named: run `make text`, or just train")
    if needs_hub(cfg) and not machine.hub:
        lacking.append("a hub that answers: what is not cached cannot be downloaded")
    return lacking


def _missing_memory_and_disk(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    need = max(sum(training.memory.values()) for training in plan.trainings)
    if not plan.on_gpus and need * plan.ranks > machine.memory:
        yield f"memory: {size(need * plan.ranks)} for {size(machine.memory)} free"
    if machine.gpus and need > machine.gpu_memory:
        yield (
            f"GPU memory: {size(need)} for {size(machine.gpu_memory)}; lower budget.micro_batch, or set "
            f"budget.activation_checkpointing=true"
        )
    most, final = checkpoint_bytes(plan.cfg, plan.shape.parameters)
    cached = costs.cached_tokens(plan.cfg, plan.shape)
    disk = most + (len(plan.trainings) - 1) * final + (cached if machine.one_disk else 0)
    if disk > machine.runs_free:
        what = " and for the token cache" if machine.one_disk and cached else ""
        yield f"disk in {plan.cfg.runs_dir}{what}: {size(disk)} for {size(machine.runs_free)} free"
    if cached > machine.cache_free and not machine.one_disk:
        yield f"disk for the token cache: {size(cached)} for {size(machine.cache_free)} free"
