"""A plan as a page of text: every estimate with what it is derived from, and in the end what is missing here."""

from __future__ import annotations

import textwrap
from pathlib import Path

from qat.tools.plan import communication, costs, memory
from qat.tools.plan.machine import needs_hub
from qat.tools.plan.plan import Plan, Training
from qat.utils import files

_LABEL, _WIDTH = 24, 116  # characters: of a label, of a line
_MANY = 4  # passes, up to which repeated text is worth about as much as new text (arXiv 2305.16264)
_FLEETS = (8, 16, 64)  # GPUs
_GPUS = (24e9, 48e9, 80e9, 141e9, 192e9)  # bytes that data-centre GPUs have


def page(plan: Plan) -> str:
    """Return the whole page, its lines wrapped."""
    sections = (_what, _model, _text, _memory, _time, _scaling, _evaluation, _disk, _downloads, _licences, _missing)
    lines = (line for section in sections for line in section(plan))
    return "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent=" " * (_LABEL + 2)) for line in lines)


def size(count: float) -> str:
    """Return the bytes in the unit that suits: 1 GB is 10^9."""
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


def between(low: float, high: float, write) -> str:
    return write(low) if write(low) == write(high) else f"{write(low)} to {write(high)}"


def _row(what: str, value: str, basis: str = "") -> str:
    """Return a labelled value and what it is derived from."""
    return f"  {what:<{_LABEL}}{value}{f'  ({basis})' if basis else ''}"


def _what(plan: Plan) -> list[str]:
    cfg = plan.cfg
    where = f"{plan.ranks} x {plan.machine.gpu or 'GPU'}" if plan.on_gpus else plan.machine.name
    lines = [f"{cfg.experiment or 'run'}: budget={cfg.budget.name} protocol={cfg.protocol} on {where}, "]
    lines[0] += f"{cfg.budget.arithmetic.upper()} arithmetic{', compiled' if cfg.budget.compile else ''}"
    for training in plan.trainings:
        done = f"{training.done} of {cfg.steps} steps done here" if training.done else f"{cfg.steps} steps"
        lines.append(_row("run" if training.quantized else "baseline" if cfg.quantized else "run", training.id, done))
    return lines


def _model(plan: Plan) -> list[str]:
    name = plan.cfg.model.name
    if plan.shape is None:
        return ["", f"model {name}: sizes unknown", f"  {plan.unknown}"]
    return [
        "",
        f"model {name}: {count(plan.shape.parameters)} parameters ({plan.source})",
        *str(plan.coverage).split("\n"),
    ]


def _text(plan: Plan) -> list[str]:
    cfg = plan.cfg
    step, run = costs.tokens(cfg)
    micro, accumulation = cfg.batch
    lines = ["", f"text {cfg.data.name}"]
    lines.append(_row("a step", f"{step:,} tokens", f"{micro} x {cfg.budget.seq_len}, {accumulation} times"))
    lines.append(_row("the run", f"{count(run)} tokens", f"{cfg.steps:,} steps"))
    known = costs.text(cfg)
    if known is None:
        return [*lines, _row("the text", "size unknown")]
    times = run / known[0]
    seen = f"read {times:,.1f} times" if times >= 0.95 else f"of which {times:.2g} is read"
    lines.append(_row("the text", f"{count(known[0])} tokens, {seen}", known[2]))
    if times > _MANY:
        lines.append(_row("", f"CAUTION: beyond {_MANY} passes, repeated text teaches less and less"))
    return lines


def _memory(plan: Plan) -> list[str]:
    if plan.shape is None:
        return []
    first, last = plan.trainings[0].memory, plan.trainings[-1].memory
    how = "" if plan.ranks == 1 else f", budget.parallel={plan.cfg.budget.parallel}"
    lines = ["", f"memory of each of {plan.ranks} {'GPU' if plan.on_gpus else 'process'}(s){how}"]
    for part in last:
        value = size(last[part])
        if size(first.get(part, 0)) != value:
            value += f"  (baseline {size(first.get(part, 0))})"
        lines.append(_row(part, value))
    total, baseline = sum(last.values()), sum(first.values())
    basis = f"eager steps; right within a factor {memory.ERROR} on CPUs, not measured on GPUs, nor compiled"
    lines.append(_row("together", f"{size(total)}  (baseline {size(baseline)})", basis))
    if plan.on_gpus:
        enough = next((f"{each / 1e9:.0f} GB" for each in _GPUS if each >= max(total, baseline)), "none of one GPU")
        less = "" if plan.cfg.budget.activation_checkpointing else "budget.activation_checkpointing=true, "
        less = (
            f"; less with {less}a smaller budget.micro_batch at more accumulation, or a smaller budget.largest_logits"
        )
        lines.append(_row("a GPU that holds it", f"{enough}{less}"))
    return lines


def _time(plan: Plan) -> list[str]:
    if plan.shape is None:
        return []
    lines = ["", f"training time on {plan.ranks} rank(s), taken to scale without loss"]
    for training in plan.trainings:
        lines += _rates(plan, training)
    spans = [_left(plan, training) for training in plan.trainings]
    both = between(sum(low for low, _ in spans), sum(high for _, high in spans), duration)
    gpus = ""
    if plan.on_gpus:
        gpus = (
            between(*(plan.ranks * sum(each) for each in zip(*spans, strict=True)), lambda hours: f"{hours:,.1f}")
            + " GPU hours"
        )
    return [*lines, _row("together", both, gpus)]


def _left(plan: Plan, training: Training) -> tuple[float, float]:
    step, _ = costs.tokens(plan.cfg)
    return training.hours(step * (plan.cfg.steps - training.done), plan.ranks)


def _rates(plan: Plan, training: Training) -> list[str]:
    name = plan.cfg.quant.format if training.quantized else "bf16"
    first, *others = training.rates
    rate = between(first.low, first.high, lambda r: f"{r:,.0f}")
    lines = [_row(name, f"{between(*_left(plan, training), duration)}, {rate} tokens/s a rank")]
    lines.append(_row("", first.basis))
    for other in others:
        rate = between(other.low, other.high, lambda r: f"{r:,.0f}")
        lines.append(_row("", f"for comparison {rate}: {other.basis}"))
    return lines


def _scaling(plan: Plan) -> list[str]:
    if plan.shape is None or not plan.on_gpus:
        return []
    cfg, calls = plan.cfg, max(1, plan.cfg.batch[1] // plan.ranks)
    tokens = calls * cfg.batch[0] * cfg.budget.seq_len
    fastest = max(training.rates[0].high for training in plan.trainings)
    lines = ["", f"more GPUs, each with {tokens:,} tokens a step as here, budget.parallel={cfg.budget.parallel}"]
    for gpus in _FLEETS:
        traffic = communication.of_step(plan.shape, cfg, gpus, calls)
        sent = sum(each.sent(gpus) for each in traffic)
        share = communication.efficiency(tokens / fastest, traffic, gpus)
        value = f"{share:.0%} of {gpus} times the rate of one: {size(sent)} in {sum(t.calls for t in traffic)} calls"
        lines.append(_row(f"{gpus} GPUs", f"{value}, {communication.seconds(traffic, gpus):.2g} s a step"))
    basis = f"ASSUMED: {communication.WITHIN / 1e9:.0f} GB/s a GPU among {communication.NODE} of a node, "
    basis += f"{communication.BETWEEN / 1e9:.0f} GB/s a node beyond, nothing sent while computing, the fastest rate "
    basis += f"above. The first process alone reads text: {count(gpus * fastest)} tokens/s for {gpus}"
    return [*lines, _row("", basis)]


def _evaluation(plan: Plan) -> list[str]:
    asked, tokens = costs.questions(plan.cfg)
    lines = ["", f"evaluation: benchmark={plan.cfg.benchmark.name}, one process, {plan.scored} models"]
    lines.append(
        _row("questions", f"{asked:,}, {count(tokens)} tokens a model", "from samples; choices and examples counted")
    )
    heldout = costs.heldout(plan.cfg)
    lines.append(_row("held-out text", f"{count(heldout)} tokens, {plan.passes} passes", "KL takes the baseline's too"))
    if plan.shape is not None:
        total = plan.scored * tokens + plan.passes * heldout
        hours = (each / 3 for each in plan.trainings[0].hours(total, 1))
        lines.append(
            _row(
                "time", between(*hours, duration), "a forward pass as a third of a BF16 step; short prompts are slower"
            )
        )
    return lines


def _disk(plan: Plan) -> list[str]:
    cfg = plan.cfg
    lines = ["", f"disk ({cfg.runs_dir}: {size(plan.machine.runs_free)} free)"]
    if plan.shape is not None:
        most, final = costs.checkpoints(plan.shape)
        lines.append(
            _row(
                "checkpoints",
                f"{size(most)} while a run trains, {size(final)} of each that is finished",
                f"12 and 4 bytes a parameter; two kept, one being written, every {cfg.budget.checkpoint_every} steps",
            )
        )
        tensors = 3 * len(plan.coverage.linears)
        lines.append(
            _row(
                "metrics, telemetry",
                size(costs.rows(cfg, tensors)),
                f"{tensors} tensors at most, every {cfg.budget.telemetry_every} steps",
            )
        )
        cached = costs.cached_tokens(cfg, plan.shape)
        if cached:
            lines.append(_row("token cache", size(cached), "in $HIF8_CACHE, shared by all runs"))
    return [*lines, _row("samples", size(costs.samples(cfg, plan.scored)), f"of {plan.scored} models")]


def _downloads(plan: Plan) -> list[str]:
    cfg, lines = plan.cfg, []
    if cfg.model.source == "hub" and not Path(files.expand(cfg.model.path)).is_dir():
        weights = size(2 * plan.shape.parameters) if plan.shape else "size unknown"
        pinned = "" if cfg.model.revision else "; model.revision is not pinned"
        lines.append(_row("model", f"{cfg.model.path}: {weights}", f"BF16{pinned}"))
    if cfg.data.source == "hub" and not Path(files.expand(cfg.data.path)).is_dir():
        known = costs.text(cfg)
        _, run = costs.tokens(cfg)
        if known:
            part = size(known[1] * min(1, run / known[0]))
            lines.append(
                _row(
                    "text",
                    f"{cfg.data.path}: up to {part}",
                    f"the share read of {size(known[1])}; only its text column",
                )
            )
        else:
            lines.append(
                _row("text", f"{cfg.data.path}: about {size(run * costs.CHARACTERS)}", "uncompressed; size not known")
            )
    if cfg.data.source == "prepared":
        lines.append(_row("text", "52 MB", "documentation packages of Debian 12, for `make text`"))
    lines.append(_row("benchmarks", "nothing: they are in a package"))
    return ["", "downloads, where nothing is cached yet", *lines]


def _licences(plan: Plan) -> list[str]:
    cfg = plan.cfg
    texts = {"text": cfg.data} | ({"validation": cfg.validation} if cfg.validation else {})
    terms = {name: costs.DATA_LICENCES.get(text.path, "unknown; see its card") for name, text in texts.items()}
    return [
        "",
        "licences",
        _row("model", cfg.model.licence),
        *(_row(name, licence) for name, licence in terms.items()),
        _row("benchmarks", "MMLU and HellaSwag MIT, ARC CC BY-SA 4.0"),
    ]


def missing(plan: Plan) -> list[str]:
    """Return what this machine lacks of what the plan needs."""
    cfg, machine, found = plan.cfg, plan.machine, []
    if plan.on_gpus and machine.gpus < plan.ranks:
        found.append(f"{plan.ranks} GPU(s): this machine has {machine.gpus}")
    found += _too_little(plan) if plan.shape is not None else ["the model's config.json"]
    found += machine.problems
    if cfg.data.source == "prepared" and cfg.data.revision is None:
        found.append(f"the text {cfg.data.name}, by whose revision runs are named: run `make text`, or just train")
    if needs_hub(cfg) and not machine.hub:
        found.append("a hub that answers: what is not cached cannot be downloaded")
    return found


def _too_little(plan: Plan) -> list[str]:
    machine, found = plan.machine, []
    need = max(sum(training.memory.values()) for training in plan.trainings)
    if not plan.on_gpus and need * plan.ranks > machine.memory:
        found.append(f"memory: {size(need * plan.ranks)} for {size(machine.memory)} free")
    if machine.gpus and need > machine.gpu_memory:
        found.append(
            f"GPU memory: {size(need)} for {size(machine.gpu_memory)}; lower budget.micro_batch, or set "
            f"budget.activation_checkpointing=true"
        )
    most, final = costs.checkpoints(plan.shape)
    disk = most + (len(plan.trainings) - 1) * final
    cached = costs.cached_tokens(plan.cfg, plan.shape)
    runs = disk + (cached if machine.one_disk else 0)
    if runs > machine.runs_free:
        what = " and for the token cache" if machine.one_disk and cached else ""
        found.append(f"disk in {plan.cfg.runs_dir}{what}: {size(runs)} for {size(machine.runs_free)} free")
    if cached > machine.cache_free and not machine.one_disk:
        found.append(f"disk for the token cache: {size(cached)} for {size(machine.cache_free)} free")
    return found


def _missing(plan: Plan) -> list[str]:
    found = missing(plan)
    return ["", *(f"missing here: {each}" for each in found)] if found else ["", "missing here: nothing"]
