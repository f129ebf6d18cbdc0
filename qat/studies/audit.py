"""Throw the switches between the paper's text and its released code (experiments/paper.yaml), one at a time.

Every cell is exp8 or exp3 under protocol=paper with one change. What a switch does is the difference between the cell
with it and the cell without, each less its own matched baseline: a switch that changes training itself (labels, master
weights, duplicates) has a baseline of its own, and what it does to forgetting is baseline against baseline.
`scaling.observe_in_warmup` is not among them: a history that is discarded may as well be empty, so it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from scipy.stats import linregress

from qat.analysis import stats
from qat.config import Config
from qat.errors import ConfigError
from qat.runs.folder import Run
from qat.studies import measures
from qat.studies.contrasts import Claim, Estimate, Response, Statement, with_holm
from qat.studies.design import Cell, Compose, Key, need_other_text, refuse
from qat.studies.measures import Measured
from qat.studies.registration import Registered, Registration, registration

PLAIN = "as the text"
SPLIT = "exp8, a sequence a call"  # exp8 with a step's sequences in as many calls: a tick a call is then another thing
_ALL = 'quant.scope=["mlp.*","self_attn.*"]'


@dataclass(frozen=True)
class Switch:
    """Name a change, its row in the table of disagreements (None: it has none), its overrides, what they change."""

    name: str
    row: int | None
    overrides: list[str]
    bases: tuple[str, ...] = ("exp8",)


SWITCHES = (
    Switch("labels shifted twice", 1, ["data.label_shift=twice"], ("exp8", "exp3")),
    Switch("overflow saturates", 2, ["quant.overflow=saturate"], ("exp8", "exp3")),
    Switch("overflow to Inf", 2, ["quant.overflow=inf"], ("exp8", "exp3")),
    Switch("a tick a call", 3, ["scaling.tick=call"], (SPLIT,)),
    Switch("ranks not synchronized", 3, ["scaling.sync=none"]),
    Switch("warmup's history kept", 4, ["scaling.discard_after_warmup=false"]),
    Switch("scales held for 10 ticks", 5, ["scaling.update_every=10", "scaling.settle=0.1"], ("exp3",)),
    Switch("MLP of all blocks", 6, ["quant.bf16_blocks=0"], ("exp8", "exp3")),
    Switch("attention too", 6, [_ALL], ("exp8", "exp3")),
    Switch("attention too, all blocks", 6, [_ALL, "quant.bf16_blocks=0"], ("exp8", "exp3")),
    Switch("no master weights", 9, ["optim.master_weights=false"]),
    Switch("BF16 throughout", 15, ["optim.pure_bf16=true", "optim.master_weights=false", "budget.arithmetic=bf16"]),
    Switch("every micro-batch twice", 10, ["data.duplicate_workers=2"]),
    Switch("operands descaled first", 13, ["quant.operands=descaled"]),
    Switch("learning rate from 0", 14, ["optim.lr_from_zero=true"]),
    Switch("gradients to 224", None, ["quant.target_gradient=224"]),
)
SCOPES = (PLAIN, "MLP of all blocks", "attention too", "attention too, all blocks")


def design(overrides: Sequence[str], compose: Compose, only: Sequence[Key] = ()) -> tuple[list[Cell], dict[str, str]]:
    """Return the cells under command-line overrides, and {switch: why it is left out}. A key is (base, switch).

    only: the keys that are wanted; all, where there are none.
    """
    registered()  # what is wrong with it is said before anything is trained
    refuse(overrides, ["experiment", "scaling", "window", "lr", "warmup", "quant"], "audit")
    for switch in SWITCHES:
        if not only or {(base, switch.name) for base in switch.bases} & set(only):
            own = [override.partition("=")[0] for override in switch.overrides]
            refuse(overrides, own, f'audit\'s switch "{switch.name}"')
    for override in overrides:
        if override.startswith("protocol=") and override != "protocol=paper":
            raise ConfigError(f"{override}: the audit throws its switches one at a time; set protocol=paper")
    bases = {"exp8": ("exp8", []), "exp3": ("exp3", [])}  # (experiment, changes)
    left_out = {}
    exp8 = compose("exp8", overrides, []).cfg
    need_other_text(exp8)
    split = _split(exp8)
    if split is None:
        left_out["a tick a call"] = "a step is one sequence, so calls are steps; set budget.micro_batch=2 or more"
    else:
        bases[SPLIT] = ("exp8", split)
    keys = [(base, PLAIN, []) for base in bases]
    keys += [(base, switch.name, switch.overrides) for switch in SWITCHES for base in switch.bases if base in bases]
    cells = []
    for base, name, changes in keys:
        if only and (base, name) not in only:
            continue
        experiment, of_base = bases[base]
        job = compose(experiment, overrides, [*of_base, *changes])
        cells.append(Cell(job.cfg, job.overrides, (base, name)))
    return cells, left_out


def trainable(cells: Sequence[Cell], ranks: int) -> tuple[list[Cell], dict[str, str]]:
    """Return those cells that so many ranks can train or have trained, and {label: why it is left out}."""
    alone = [cell for cell in cells if cell.cfg.scaling.sync == "none" and ranks == 1]
    left_out = [cell for cell in alone if not Run.of(cell.cfg).finished]
    why = "one rank has nobody to synchronize with; train it with RANKS=2 or more, a divisor of budget.accumulation"
    return [cell for cell in cells if cell not in left_out], {cell.label: why for cell in left_out}


def _split(cfg: Config) -> list[str] | None:
    """Return what makes a step several calls, on the same sequences; nothing where it is, None where it cannot be."""
    micro, accumulation = cfg.batch
    if accumulation > 1:
        return []
    if micro == 1:
        return None
    return ["budget.micro_batch=1", f"budget.accumulation={micro}", "budget.batch_factor=1"]  # `micro` has the factor


# --------------------------------------------------------------------------------------------------- effects


def effects(measured: Sequence[Measured]) -> list[dict]:
    """Estimate every switch's effect on each response, a row a base, with Holm's correction over switches."""
    keys = list(dict.fromkeys(m.key for m in measured if m.key[1] != PLAIN))
    columns = {
        name: with_holm(response, [_effect(measured, name, response, key) for key in keys])
        for name, response in responses(measured).items()
    }
    return [
        {
            "base": base,
            "switch": name,
            "row": next(switch.row for switch in SWITCHES if switch.name == name),
            "linears": next(m.linears for m in measured if m.key == (base, name)),
            "effects": {response: column[i] for response, column in columns.items()},
        }
        for i, (base, name) in enumerate(keys)
    ]


def responses(measured: Sequence[Measured]) -> dict[str, Response]:
    """Return what a switch may change, by the heading of its column."""
    return {
        "Held-out loss, W8A8": measures.heldout(measured, "w8a8"),
        "Held-out loss, BF16 weights": measures.heldout(measured, "bf16"),
        "Loss APE": measures.ape(measured),
        "Points, W8A8": measures.points(measured, "w8a8"),
        "Held-out loss, PTQ": measures.heldout(measured, "ptq"),
        "Forgetting": measures.points(measured, "baseline", "pretrained"),
    }


# Responses that are none of the run's own: what identifies whose they are.
_OF_BASELINE = {"Forgetting": attrgetter("baseline"), "Held-out loss, PTQ": attrgetter("baseline", "ptq")}


def _effect(measured: Sequence[Measured], name: str, response: Response, key: Key) -> Estimate | None:
    plain = (key[0], PLAIN)
    if name in _OF_BASELINE:
        ours, theirs = ({_OF_BASELINE[name](m) for m in measured if m.key == side} for side in (key, plain))
        if ours == theirs:
            return None  # the very same baseline
    return response.contrast({key: 1, plain: -1})


# ---------------------------------------------------------------------------------------------------- claims


def registered() -> Registration:
    """Read what was registered before the runs."""
    return registration("audit", CLAIMS)


def claims(measured: Sequence[Measured], cfg: Config) -> list[dict]:
    """Judge the registered claims (`qat.studies.contrasts.Claim`); cfg: of exp8 by the text."""
    if not measured:
        return []
    return [CLAIMS[key](claim, measured, cfg).judge() for key, claim in registered().claims.items()]


def _loss(claim: Registered, measured: Sequence[Measured], other: bool = False) -> float:
    """Return the margin of a claim in nats of held-out loss, on the data's own text or the other one."""
    plain = [m.losses("baseline", other=other).mean() for m in measured if m.key[1] == PLAIN]
    return claim.margins["other_loss" if other else "heldout_loss"] / 100 * float(np.mean(plain or [0]))


def _labels(claim: Registered, measured: Sequence[Measured], _: Config) -> Claim:
    forgotten = measures.heldout(measured, "baseline", "pretrained", other=True)
    loss, once, twice = _loss(claim, measured, other=True), ("exp3", PLAIN), ("exp3", "labels shifted twice")
    more = Statement(
        "BF16 at lr 1e-4 forgets more than the threshold beyond what it does with sound labels",
        forgotten,
        {twice: 1, once: -1},
        low=loss,
        margin=loss,
    )
    explains = Statement(
        "the double shift explains more than half of the forgetting",
        Response("Share of the forgetting", "of it", 2, {}, measure="forgetting_share"),
        low=0.5,
        estimate=lambda level: explained(forgotten, once, twice, level),
        without="it was not seen that anything is forgotten, or a cell that it needs is missing",
    )
    return Claim(claim, [more, explains])


def explained(forgotten: Response, once: Key, twice: Key, level: float) -> Estimate | None:
    """Estimate 1 - once / twice, the share of what twice-shifted labels forget, in nats, that sound labels do not.

    The interval is that of its linearization (delta method). None where it is not clear that anything is forgotten.
    """
    sides = [forgotten.contrast({key: 1}) for key in (once, twice)]
    if any(side is None or side.low is None for side in sides) or sides[1].low <= 0:
        return None
    ratio = sides[0].value / sides[1].value
    slope = forgotten.contrast({once: 1 / sides[1].value, twice: -ratio / sides[1].value}, level)
    if slope is None or slope.low is None or slope.of != sides[1].of:  # seeds that have both cells are too few
        return None
    half = (slope.high - slope.low) / 2
    ends = 1 - ratio - half, 1 - ratio + half
    return Estimate(1 - ratio, *ends, None, slope.n, slope.of, level, slope.detectable)


def _clipping(claim: Registered, measured: Sequence[Measured], _: Config) -> Claim:
    held, loss = measures.heldout(measured, "w8a8"), _loss(claim, measured)
    what = "exp8: {} is better by more than that".format
    changes = {name: {("exp8", name): 1, ("exp8", PLAIN): -1} for name in ("overflow saturates", "overflow to Inf")}
    statements = [Statement(what(name), held, change, high=-loss, margin=loss) for name, change in changes.items()]
    return Claim(claim, statements, needs="any")


def _calls(claim: Registered, measured: Sequence[Measured], cfg: Config) -> Claim:
    held, loss = measures.heldout(measured, "w8a8"), _loss(claim, measured)
    change = {(SPLIT, "a tick a call"): 1, (SPLIT, PLAIN): -1}
    micro, accumulation = cfg.batch
    calls = (cfg.steps - cfg.bf16_warmup_steps) * (accumulation if accumulation > 1 else micro)
    length = Response("Length of a run", "quantized calls", 0, {}, measure="quantized_calls")
    return Claim(
        claim,
        [Statement("the difference is within the threshold", held, change, -loss, loss, margin=loss)],
        premises=[  # else neither window forgets anything, and they are one
            Statement(
                "a run outlasts a window of calls",
                length,
                low=cfg.scaling.window,
                estimate=lambda level: Estimate(calls, calls, calls, None, 1, "run", level, 0.0),
            )
        ],
    )


def _linears(claim: Registered, measured: Sequence[Measured], _: Config) -> Claim:
    rises = Statement(
        "APE rises with a power of the number above 0",
        Response("Loss APE against linears", "as a power", 2, {}, measure="linears_exponent"),
        low=0,
        estimate=lambda level: power_of_linears(measured, level),
    )
    return Claim(claim, [rises])


def power_of_linears(measured: Sequence[Measured], level: float) -> Estimate | None:
    """Estimate b of APE = a * linears ^ b by least squares on the logarithms, `a` of each base and seed its own.

    None with fewer than two scopes.
    Which linears a scope adds matters beside their number, alike for every base and seed: so the noise is that between
    scopes, in their means over the bases and seeds that have all of them, and more runs do not make it smaller.
    """
    linears, groups = {}, {}
    for m in measured:
        if m.key[0] in ("exp8", "exp3") and m.key[1] in SCOPES and m.ape > 0:
            linears[m.key[1]] = m.linears
            groups.setdefault((m.key[0], m.seed), {})[m.key[1]] = np.log(m.ape)
    scopes = list(max(groups.values(), key=len, default={}))
    if len({linears[scope] for scope in scopes}) < 2:
        return None
    apes = [[group[scope] for scope in scopes] for group in groups.values() if set(scopes) <= set(group)]
    fit = linregress(np.log([linears[scope] for scope in scopes]), np.mean(apes, axis=0))
    mean = stats.Mean(float(fit.slope), ((float(fit.stderr), len(scopes) - 2),)) if len(scopes) > 2 else None
    return Estimate.from_mean(float(fit.slope), mean, len(scopes), "scopes", level)


def _modes(claim: Registered, measured: Sequence[Measured], _: Config) -> Claim:
    between, loss = measures.heldout(measured, "w8a8", "bf16", other=True), _loss(claim, measured, other=True)
    what, cells = "{}: the same loss on other text in either mode".format, (("exp8", PLAIN), ("exp3", PLAIN))
    return Claim(claim, [Statement(what(cell[0]), between, {cell: 1}, -loss, loss, margin=loss) for cell in cells])


CLAIMS = {  # by their keys in experiments/claims.yaml
    "labels": _labels,
    "clipping": _clipping,
    "calls": _calls,
    "linears": _linears,
    "modes": _modes,
}
