"""Replay the amaxes that runs recorded: what would any scaling rule have predicted, and what did the rules cost?

Two things are read of every run, and none is trained again:

- its trace of amaxes (`qat.runs.trace`). A bank of any rule is fed with it step by step and says what that rule would
  have predicted. It is exact for the amaxes as they are, and they are of a run under its own rule: how training would
  have gone on under another one is not in it. The run's own rule, replayed, must give what the run recorded.
- its telemetry of `scaling.shadow`: loss and gradients of the same batch on the same weights under the scales of each
  rule, beside those without quantization.

Differences between rules are paired by step, and their intervals know that neighbouring steps are alike
(`qat.analysis.stats.over_steps`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qat.analysis import stats
from qat.analysis.decisions import APE_THRESHOLD, DECISIONS, decide
from qat.analysis.stats import LEVEL
from qat.config import ROLES, Config, ScalingConfig
from qat.errors import UserError
from qat.quant.formats import TOLERANCE
from qat.quant.rules import RULES, named, split
from qat.quant.scaling import ScaleBank
from qat.runs.folder import Run
from qat.runs.identity import identity
from qat.studies.contrasts import Claim, Estimate, Response, Statement
from qat.studies.registration import Registered, Registration, registration

# The rules that the claims are about, and one that is known to do damage.
LAST, LONGEST, HELD, CONTROL = "most_recent", "max:64", "max:64/10", "max:64+8"
TO_TRY = (LAST, "max:16", LONGEST, HELD, CONTROL, "current")  # beside a run's own, as docs/results.md recommends


@dataclass
class Replayed:
    """Hold one run: its trace under several rules, and its rows of `scaling.shadow`.

    names: of the tensors. steps: the quantized steps that were not skipped. amax: FP32 [steps, tensors]. overshoot: the
    same shape, by rule: amax / predicted amax, 0 where nothing was recorded. shadow: {rule: {column: FP64 [steps]}},
    of the steps that have it, with the columns loss, unquantized, cosine, norm_error, and sqnr_db and clipped by role.
    """

    run: Run
    cfg: Config
    names: list[str]
    steps: np.ndarray
    amax: np.ndarray
    overshoot: dict[str, np.ndarray]
    shadow: dict[str, dict[str, np.ndarray]]

    @property
    def roles(self) -> list[str]:
        return [role for role in ROLES if any(name.endswith(f"/{role}") for name in self.names)]

    def beyond(self, rule: str) -> np.ndarray:
        """Return the percentage of tensors beyond their predicted amax, FP64 [steps]."""
        return 100 * (self.overshoot[rule] > TOLERANCE).mean(axis=1)

    def damage(self, rule: str) -> np.ndarray:
        """Return the loss less that without quantization, of the same weights and batch, FP64 [steps with telemetry]"""
        return self.shadow[rule]["loss"] - self.shadow[rule]["unquantized"]


def read(folder: Path, rules: Sequence[str]) -> Replayed:
    """Replay the trace of a run under rules by name (`qat.quant.rules.named`), and read its shadow rows.

    Errors: UserError for a folder whose trace is missing or cannot be replayed to the bit.
    """
    run = Run(folder)
    cfg = run.typed_config()
    if not cfg.quantized:
        raise UserError(f"{folder}: a BF16 run predicts nothing; name a quantized one")
    if cfg.scaling.tick == "call":
        raise UserError(f"{folder}: scaling.tick=call: its trace has the largest amax of a step's calls alone")
    if RULES[cfg.scaling.algo].learns:
        raise UserError(f"{folder}: scaling={cfg.scaling.algo} learns from gradients, of which its trace tells nothing")
    rows = run.metrics()
    names, amax = run.amaxes()
    amax = torch.tensor(amax[: len(rows)])
    counted = [row["step"] - 1 for row in rows if row["quantized"] and not row["skipped"]]
    if len(counted) < 2:
        raise UserError(f"{folder}: has no quantized steps to replay; name a run that is longer than its warmup")

    def replayed(scaling: ScalingConfig, settle_steps: int = 0) -> np.ndarray:
        targets = [getattr(cfg.quant, f"target_{name.rpartition('/')[2]}") for name in names]
        bank = ScaleBank(names, targets, scaling, settle_steps)
        return bank.replay(amax, cfg.bf16_warmup_steps + 1)[counted].numpy()

    own = replayed(cfg.scaling, cfg.settle_steps).max(axis=1)
    for row, overshoot in zip((rows[i] for i in counted), own.tolist(), strict=True):
        if row["overshoot_max"] != overshoot:
            recorded = f"{overshoot:g} at step {row['step']}, where the run recorded {row['overshoot_max']:g}"
            raise UserError(f"{folder}: its trace is of another run, or damaged: it gives an overshoot of {recorded}")
    overshoot = {name: replayed(named(name, cfg.scaling, "replay.rules")) for name in rules}
    steps = np.array(counted) + 1
    one = Replayed(run, cfg, names, steps, amax.numpy()[counted], overshoot, {})
    one.shadow = _shadow(run, one.roles)
    return one


def _shadow(run: Run, roles: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return the rows of `scaling.shadow` of the steps at which all rules have a finite loss."""
    rows: dict[str, dict[int, dict]] = {}
    for row in run.telemetry():
        if "shadow" in row and row["loss"] is not None and row["unquantized"] is not None:
            flat = row | {f"{key}/{role}": share for key in ("sqnr_db", "clipped") for role, share in row[key].items()}
            rows.setdefault(row["shadow"], {})[row["step"]] = flat
    steps = sorted(set.intersection(*map(set, rows.values()))) if rows else []
    columns = ("loss", "unquantized", "cosine", "norm_error")
    columns += tuple(f"{key}/{role}" for key in ("sqnr_db", "clipped") for role in roles)
    return {
        rule: {key: np.array([by_step[step].get(key, np.nan) for step in steps], float) for key in columns}
        for rule, by_step in rows.items()
        if steps
    }


def refuse_unlike(replayed: Sequence[Replayed]) -> None:
    """Raise `UserError` unless the runs are of one recipe, with different seeds."""
    recipes = [identity(one.cfg) for one in replayed]
    seeds = {recipe.pop("seed") for recipe in recipes}
    if any(recipe != recipes[0] for recipe in recipes) or len(seeds) < len(recipes):
        raise UserError("runs: must be of one recipe with different seeds; replay others by commands of their own")


# ------------------------------------------------------------------------------------------------ estimates


def estimate(series: Sequence[np.ndarray], level: float = 1 - LEVEL) -> Estimate | None:
    """Estimate the mean of FP64 [steps] of every run; None without any."""
    series = [steps for steps in series if len(steps)]
    if not series:
        return None
    mean = stats.over_steps(series)
    n, of = (len(series), "seeds") if len(series) > 1 else (len(series[0]), "steps")
    return Estimate.from_mean(float(np.mean([steps.mean() for steps in series])), mean, n, of, level)


def of_cosine(replayed: Sequence[Replayed], rule: str, other: str) -> list[np.ndarray]:
    """Return the cosine of a rule's gradient with the unquantized one, less another rule's, at the steps of each run
    that have both."""
    changes = [one.shadow[rule]["cosine"] - one.shadow[other]["cosine"] for one in replayed]
    return [steps[np.isfinite(steps)] for steps in changes]


def of_rule(replayed: Sequence[Replayed], rule: str, other: str | None = None) -> list[np.ndarray]:
    """Return the damage of a rule, or what it is above that of another one, in nats, of the runs that have both."""
    have = [one for one in replayed if {rule, other or rule} <= one.shadow.keys()]
    return [one.damage(rule) - (one.damage(other) if other else 0) for one in have]


RESPONSES = {
    "overshoot": Response("Tensors beyond their predicted amax", "points", 2, {}, measure="overshoot"),
    "batch_loss": Response("Loss of the same batch on the same weights", "nats", 4, {}, measure="batch_loss"),
    "cosine": Response("Cosine with the unquantized gradient", "", 4, {}),
}


def margin(replayed: Sequence[Replayed]) -> float | None:
    """Return the loss that is too small a difference to count, in nats; None where no loss was measured."""
    losses = [rows["unquantized"].mean() for one in replayed for rows in one.shadow.values()]
    return APE_THRESHOLD / 100 * float(np.mean(losses)) if losses else None


def by_role(replayed: Sequence[Replayed], rule: str) -> dict[str, dict[str, float]]:
    """Return, of every role, `beyond`: percent of tensors and steps, `largest`: overshoot, `headroom`: the median of
    predicted / actual amax in octaves."""
    rows = {}
    for role in replayed[0].roles:
        values = [one.overshoot[rule][:, [name.endswith(f"/{role}") for name in one.names]] for one in replayed]
        values = np.concatenate([part.ravel() for part in values])
        headroom = -float(np.median(np.log2(values[values > 0]))) if values.any() else math.nan
        shares = {"beyond": 100 * float((values > TOLERANCE).mean()), "largest": float(values.max())}
        rows[role] = shares | {"headroom": headroom}
    return rows


def by_block(replayed: Sequence[Replayed], rule: str) -> dict[int, float]:
    """Return the percentage of tensors and steps beyond their prediction, by block."""
    blocks = np.array([int(re.search(r"\.(\d+)\.", name)[1]) for name in replayed[0].names])
    beyond = np.concatenate([one.overshoot[rule] > TOLERANCE for one in replayed])
    return {int(block): 100 * float(beyond[:, blocks == block].mean()) for block in np.unique(blocks)}


def worst_tensor(replayed: Sequence[Replayed]) -> str:
    """Return the tensor of the first run that exceeds the prediction of any rule most."""
    one = replayed[0]
    largest = np.max([overshoot.max(axis=0) for overshoot in one.overshoot.values()], axis=0)
    return one.names[int(largest.argmax())]


def differences(replayed: Sequence[Replayed]) -> list[dict]:
    """Return what every rule tried in all runs costs, and that less the first rule's, JSON-able.

    The first is most_recent where it was tried. change: of the loss; turned: of the gradient's cosine. Intervals of
    these differences hold together, for each of the two. decision: of the former (`qat.analysis.decisions`).
    """
    tried = [rule for rule in replayed[0].shadow if all(rule in one.shadow for one in replayed)]
    first = LAST if LAST in tried else next(iter(tried), None)
    rows, level = [], 1 - LEVEL / max(1, len(tried) - 1)
    for rule in tried:
        damage = estimate(of_rule(replayed, rule))
        change = estimate(of_rule(replayed, rule, first), level) if rule != first else None
        columns = {
            key: float(np.nanmean([np.nanmean(one.shadow[rule][key]) for one in replayed]))
            for key in replayed[0].shadow[rule]
            if key not in ("loss", "unquantized")
        }
        row = {"rule": rule, "first": first, "damage": vars(damage), "change": None, "decision": None} | columns
        turned = estimate(of_cosine(replayed, rule, first), level) if rule != first else None
        row["turned"] = turned and vars(turned)
        if change:
            ends = None if change.low is None else (change.low, change.high)
            row["decision"] = decide(change.value, ends, margin(replayed), change.detectable)
            row["change"] = vars(change)
        rows.append(row)
    return rows


def recommendation(rows: Sequence[Mapping], limit: float | None) -> str:
    """Say in a sentence which rule to use, or that it does not matter. rows: `differences`; limit: `margin`.

    Rules with a guard are not asked: they are the damage that must be seen.
    """
    compared = [row for row in rows if row["change"] and not split(row["rule"], "scaling.shadow")[3]]
    if not compared:
        return f"What the rules cost was not measured: train with scaling.shadow=[{','.join(TO_TRY)}]."

    def cost(rows: Sequence[Mapping]) -> str:
        row = max(rows, key=lambda row: abs(row["change"]["value"]))
        return f"{row['rule']} less {row['first']} costs {_nats(Estimate(**row['change']))}"

    by = {word: [row for row in compared if row["decision"] == word] for word in DECISIONS}
    threshold = f"({APE_THRESHOLD:g} % of the loss is {limit:.4f} nats)"
    if by["gain"]:
        best = min(by["gain"], key=lambda row: row["change"]["value"])
        return f"Use {best['rule']}: {cost([best])}, a gain {threshold}."
    if unclear := by["undecided"] + by["powerless"]:
        return f"Not decided at this length: {cost(unclear)} {threshold}."
    if by["harm"]:
        worse = " and ".join(row["rule"] for row in by["harm"])
        return f"Any rule but {worse}: {cost(by['harm'])}, a harm {threshold}."
    return f"It does not matter on these weights: {cost(compared)}, and no other rule more {threshold}."


def _nats(change: Estimate) -> str:
    return f"{RESPONSES['batch_loss'].text(change)} nats"


# --------------------------------------------------------------------------------------------------- claims


def registered() -> Registration:
    """Read what was registered before the runs."""
    return registration("replay", CLAIMS)


def claims(replayed: Sequence[Replayed]) -> list[dict]:
    """Judge the registered claims (`qat.studies.contrasts.Claim`), and say what the control of losses cost here."""
    cost, entries = estimate(of_rule(replayed, CONTROL, LONGEST)), registered().claims
    judged = [make(entries[key], replayed).judge() for key, make in CLAIMS.items()]
    for claim in judged:
        if "batch_loss" in entries[claim["key"]].margins:
            claim["control"] += f": {_nats(cost) if cost else 'not run'}"
    return judged


def _saturation(claim: Registered, replayed: Sequence[Replayed]) -> Claim:
    have = [one for one in replayed if {LAST, LONGEST} <= one.overshoot.keys()]
    less = Statement(
        f"fewer tensors exceed what {LONGEST} predicts than what {LAST} does",
        RESPONSES["overshoot"],
        high=0,
        estimate=lambda level: estimate([one.beyond(LONGEST) - one.beyond(LAST) for one in have], level),
        without=f"{LAST} and {LONGEST} are not both in replay.rules",
    )
    return Claim(claim, [less])


def _states(replayed: Sequence[Replayed], what: str, rule: str, other: str, **region: float) -> Statement:
    """State something of the damage of a rule less that of another one."""
    return Statement(
        what,
        RESPONSES["batch_loss"],
        margin=margin(replayed),
        estimate=lambda level: estimate(of_rule(replayed, rule, other), level),
        without=f"{rule} and {other} are not both in scaling.shadow",
        **region,
    )


def _damage(claim: Registered, replayed: Sequence[Replayed]) -> Claim:
    what = f"under the scales of {LONGEST} the loss is lower than under those of {LAST}, by more than the threshold"
    return Claim(claim, [_states(replayed, what, LONGEST, LAST, high=-(margin(replayed) or 0))])


def _hold(claim: Registered, replayed: Sequence[Replayed]) -> Claim:
    what = f"under the scales of {HELD} the loss is higher than under those of {LONGEST}, by more than the threshold"
    return Claim(claim, [_states(replayed, what, HELD, LONGEST, low=margin(replayed) or 0)])


CLAIMS: dict[str, Callable[[Registered, Sequence[Replayed]], Claim]] = {  # by their keys in experiments/claims.yaml
    "saturation": _saturation,
    "damage": _damage,
    "hold": _hold,
}
