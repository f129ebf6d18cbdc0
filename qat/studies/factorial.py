"""Cross the paper's factors: scaling rule and window, learning rate, BF16 warmup. Were its claims true?

The grid is {current, most_recent, exp_smooth, max} x {window 1, 16, 64} x {lr 1e-4, 1e-5} x {BF16 warmup 0, 5 %} around
exp8, of 48 cells. Only `max` reads its window, and of window 1 it is `most_recent` to the bit, so they come to 20 runs:
five levels of scaling by two by two. The quantized runs of one learning rate share their BF16 baseline.

The claims, their margins and what they are tested on are registered in experiments/claims.yaml. All are about the
recipe, exp8: what is not named in a statement is as there. "Loss" is the held-out loss in W8A8. What they come to:

- saturation: by the last amax more tensors exceed their prediction, and more elements are clipped, than by `max`: the
  mean over both learning rates.
- best: the loss is lower by `max` than by any other rule.
- forgetting: BF16 training at lr 1e-4 raises the pretrained model's loss on text of another kind by more than the
  threshold, at lr 1e-5 it does not. It is a matter of the baselines alone, so no scaling rule has a part in it.
- orthogonal: what the max window and the warmup do to the loss (run less baseline) is the same at either learning rate,
  and what the one does does not depend on the other: all three interactions are within the threshold. Where neither
  damage nor forgetting (against lr 1e-5) was seen there is nothing to be orthogonal.
- necessary, for each fix: without it the loss, on the data's own text or on another kind, is higher than with it by
  more than the threshold.
- sufficient: against its baseline the recipe is within every threshold: loss on both texts, loss APE, answers.
- QAT: on text of another kind the recipe's baseline in W8A8 without QAT (PTQ) misses the threshold, and the recipe is
  better.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from qat.studies import measures
from qat.studies.contrasts import Claim, Response, Statement, Weights, with_holm
from qat.studies.design import Cell, Compose, need_other_text, refuse
from qat.studies.measures import MODES, Measured
from qat.studies.registration import Registered, Registration, registration

SCALINGS = {
    "current": ["scaling=current"],
    "most_recent": ["scaling=most_recent"],  # also: max, window 1
    "exp_smooth": ["scaling=exp_smooth"],
    "max w16": ["scaling=max", "window=w16"],
    "max w64": ["scaling=max", "window=w64"],
}
RATES = {"1e-4": ["lr=lr1e-4"], "1e-5": ["lr=lr1e-5"]}
WARMUPS = {"0": ["warmup=none"], "5 %": ["warmup=bf16_500"]}
FACTORS = {"scaling": SCALINGS, "lr": RATES, "warmup": WARMUPS}
_SET = ("experiment", *FACTORS, "window", "quant", "scaling.algo", "scaling.window", "optim.lr", "warmup.bf16")
RECIPE = ("max w64", "1e-5", "5 %")

# It scales by the very amax: nothing is ever beyond it, in any run, and its zeros would belittle the effects of others.
_PREDICTS_NOTHING = ("current",)
# What each factor is contrasted by: label -> weights of its levels.
_MAX = {"max w64": 1, "most_recent": -1}
_CONTRASTS = {
    "scaling": {level: {level: 1, "most_recent": -1} for level in SCALINGS if level != "most_recent"},
    "lr": {"lr 1e-5": {"1e-5": 1, "1e-4": -1}},
    "warmup": {"warmup": {"5 %": 1, "0": -1}},
}


def design(overrides: Sequence[str], compose: Compose) -> list[Cell]:
    """Return the grid's distinct runs under command-line overrides, those of one learning rate together."""
    registered()  # what is wrong with it is said before anything is trained
    refuse(overrides, _SET, "factorial")
    levels = {name: changes for factor in FACTORS.values() for name, changes in factor.items()}
    composed = {name: compose("exp8", overrides, changes) for name, changes in levels.items()}
    need_other_text(composed["current"].cfg)
    cells = []
    for rate, warmup, scaling in itertools.product(RATES, WARMUPS, SCALINGS):
        # Each factor is a group of its own, so a cell takes one from each; composing all would take long.
        cfg = copy.deepcopy(composed[scaling].cfg)
        cfg.optim, cfg.warmup = copy.deepcopy((composed[rate].cfg.optim, composed[warmup].cfg.warmup))
        changes = [*composed[scaling].overrides, *RATES[rate], *WARMUPS[warmup]]
        cells.append(Cell(cfg, changes, (scaling, rate, warmup)))
    return cells


def weights(left_out: Sequence[str] = (), **given: Mapping[str, float]) -> Weights:
    """Return the cells' weights: products of those given by factor and level, the mean over every other factor.

    left_out: levels that count in no mean.
    """
    others = {name: [level for level in levels if level not in left_out] for name, levels in FACTORS.items()}
    sides = [given.get(name) or dict.fromkeys(levels, 1 / len(levels)) for name, levels in others.items()]
    return {
        tuple(level for level, _ in picked): float(np.prod([weight for _, weight in picked]))
        for picked in itertools.product(*(side.items() for side in sides))
    }


def contrasts(left_out: Sequence[str] = ()) -> dict[str, Weights]:
    """Return main effects and two-way interactions, against most_recent, lr 1e-4, no warmup; means are as `weights`.

    Of what is left out there are none.
    """
    effects = {}
    for count in (1, 2):
        for names in itertools.combinations(_CONTRASTS, count):
            for picked in itertools.product(*(_CONTRASTS[name].items() for name in names)):
                labels = [label for label, _ in picked]
                given = {name: w for name, (_, w) in zip(names, picked, strict=True)}
                effects[" × ".join(labels)] = {} if set(labels) & set(left_out) else weights(left_out, **given)
    return effects


def repeated(measured: Sequence[Measured]) -> tuple[str, ...]:
    """Return the scalings whose every run is another one's to the last digit: a window of 16 where no run is longer.

    They are one test, not two, and count once in means.
    """
    by_cell = {(m.key, m.seed): m for m in measured}
    pairs = [(m, by_cell.get((("max w64", *m.key[1:]), m.seed))) for m in measured if m.key[0] == "max w16"]
    same = [a.ape == b.ape and np.array_equal(a.losses("w8a8"), b.losses("w8a8")) for a, b in pairs if b is not None]
    return ("max w16",) if same and all(same) else ()


def responses(measured: Sequence[Measured]) -> dict[str, Response]:
    """Return everything that the factors may change, by a short name."""
    predicted = [m for m in measured if m.key[0] not in _PREDICTS_NOTHING]
    return {
        **{f"heldout {mode}": measures.heldout(measured, mode) for mode in MODES},
        **{f"points {mode}": measures.points(measured, mode) for mode in MODES},
        "ape": measures.ape(measured),
        "overshoot": measures.overshoot(predicted),
        "clipped": measures.clipped(predicted),
    }


def effects(measured: Sequence[Measured]) -> list[dict]:
    """Estimate the effects on every response, with Holm's correction over them, and their noise; JSON-able."""
    tables, twice = [], repeated(measured)
    for name, response in responses(measured).items():
        left_out = (*twice, *(_PREDICTS_NOTHING if name in ("overshoot", "clipped") else ()))
        cells = contrasts(left_out)
        rows = with_holm(response, [response.contrast(weights) for weights in cells.values()])
        about = {"response": response.name, "unit": response.unit, "log": response.log, "noise": response.noise()}
        effects = [{"effect": label} | row for label, row in zip(cells, rows, strict=True)]
        tables.append(about | {"effects": effects})
    return tables


def baselines(measured: Sequence[Measured]) -> dict[str, Response]:
    """Measure the BF16 baselines, one cell a learning rate: less the pretrained checkpoint, and what PTQ costs them."""
    key = {"key": lambda m: (m.key[1],)}
    return {
        "learned": measures.heldout(measured, "baseline", "pretrained", **key),
        "forgotten": measures.heldout(measured, "baseline", "pretrained", other=True, **key),
        "answers": measures.points(measured, "baseline", "pretrained", **key),
        "ptq": measures.heldout(measured, "ptq", **key),
        "ptq, other text": measures.heldout(measured, "ptq", other=True, **key),
        "ptq points": measures.points(measured, "ptq", **key),
    }


# ---------------------------------------------------------------------------------------------------- claims


def registered() -> Registration:
    """Read what was registered before the runs."""
    return registration("factorial", CLAIMS)


def claims(measured: Sequence[Measured]) -> list[dict]:
    """Judge the registered claims (`qat.studies.contrasts.Claim`)."""
    if not measured:
        return []
    return [CLAIMS[key](claim, measured).judge() for key, claim in registered().claims.items()]


def _around_recipe(**given: Mapping[str, float]) -> Weights:
    """Return the cells' weights by factor and level; what is not given is as in the recipe."""
    return weights(**{factor: {level: 1} for factor, level in zip(FACTORS, RECIPE, strict=True)} | given)


def _alike(measured: Sequence[Measured]) -> Sequence[Measured]:
    """Return the runs of the recipe's learning rate; all, where it has none."""
    return [m for m in measured if m.key[1] == RECIPE[1]] or measured


def _loss(claim: Registered, measured: Sequence[Measured], other: bool = False) -> float:
    """Return the margin of a claim in nats: of the loss of the recipe's baseline, on its own text or the other one."""
    losses = [m.losses("baseline", other=other).mean() for m in _alike(measured)]
    return claim.margins["other_loss" if other else "heldout_loss"] / 100 * float(np.mean(losses))


def _saturation(claim: Registered, measured: Sequence[Measured]) -> Claim:
    less, by_name = _around_recipe(scaling=_MAX, lr=dict.fromkeys(RATES, 1 / len(RATES))), responses(measured)
    return Claim(
        claim,
        [
            Statement("fewer tensors exceed their predicted amax with max w64", by_name["overshoot"], less, high=0),
            Statement("fewer elements are beyond the target with max w64", by_name["clipped"], less, high=0),
        ],
    )


def _best(claim: Registered, measured: Sequence[Measured]) -> Claim:
    held, loss = measures.heldout(measured, "w8a8"), _loss(claim, measured)
    others = ("most_recent", "exp_smooth", "current")
    changes = {other: _around_recipe(scaling={"max w64": 1, other: -1}) for other in others}
    what = "max w64 has a lower held-out loss than {}".format
    return Claim(claim, [Statement(what(other), held, cells, high=0, margin=loss) for other, cells in changes.items()])


def _forgets(claim: Registered, measured: Sequence[Measured]) -> Claim:
    forgotten, loss = baselines(measured)["forgotten"], _loss(claim, measured, other=True)
    what = "BF16 at lr {} raises the loss on other text by {} than the threshold".format
    return Claim(
        claim,
        [
            Statement(what("1e-4", "more"), forgotten, {("1e-4",): 1}, low=loss, margin=loss),
            Statement(what("1e-5", "less"), forgotten, {("1e-5",): 1}, high=loss, margin=loss),
        ],
    )


def _orthogonal(claim: Registered, measured: Sequence[Measured]) -> Claim:
    held, loss = measures.heldout(measured, "w8a8"), _loss(claim, measured)
    rate, warm = _CONTRASTS["lr"]["lr 1e-5"], _CONTRASTS["warmup"]["warmup"]
    crossed = {
        "the max window does the same at either learning rate": _around_recipe(scaling=_MAX, lr=rate),
        "the warmup does the same at either learning rate": _around_recipe(warmup=warm, lr=rate),
        "the max window does the same with and without warmup": _around_recipe(scaling=_MAX, warmup=warm),
    }
    forgotten, more = baselines(measured)["forgotten"], {("1e-4",): 1, ("1e-5",): -1}
    damage = Statement("scaling by the last amax does damage", held, _around_recipe(scaling={"most_recent": 1}), low=0)
    return Claim(
        claim,
        [Statement(what, held, cells, -loss, loss, margin=loss) for what, cells in crossed.items()],
        premises=[damage, Statement("BF16 at lr 1e-4 forgets more than at lr 1e-5", forgotten, more, low=0)],
    )


def _necessary(claim: Registered, measured: Sequence[Measured], **without: Mapping[str, float]) -> Claim:
    statements = []
    for other, text in ((False, "its own text"), (True, "other text")):
        # Less the pretrained model, which both sides have in common; baselines differ between learning rates.
        held, loss = measures.heldout(measured, "w8a8", "pretrained", other), _loss(claim, measured, other)
        what, cells = f"without it the loss on {text} is higher by more than the threshold", _around_recipe(**without)
        statements.append(Statement(what, held, cells, low=loss, margin=loss))
    return Claim(claim, statements, needs="any")


def _sufficient(claim: Registered, measured: Sequence[Measured], mode: str) -> Claim:
    at, statements = _around_recipe(), []
    for other, text in ((False, "its own text"), (True, "other text")):
        held, loss = measures.heldout(measured, mode, other=other), _loss(claim, measured, other)
        statements.append(Statement(f"loss on {text} within the threshold", held, at, high=loss, margin=loss))
    if mode == "w8a8":  # of the training, however it is scored afterwards
        ape = measures.ape(measured)
        statements.append(Statement("loss APE within the threshold", ape, at, high=claim.margins["loss_ape"]))
    contrast = measures.contrast(measured, mode)
    skills = [-m.contrasts("baseline").mean() for m in _alike(measured)]
    skill = max(0.0, float(np.mean([skill for skill in skills if np.isfinite(skill)] or [0])))
    few = claim.margins["contrast"] / 100 * skill
    statements.append(Statement("answers within the threshold", contrast, at, high=few, margin=few))
    return Claim(claim, statements)


def _qat(claim: Registered, measured: Sequence[Measured]) -> Claim:
    ptq, gain = (measures.heldout(measured, *pair, other=True) for pair in (("ptq",), ("w8a8", "ptq")))
    loss, at = _loss(claim, measured, other=True), _around_recipe()
    return Claim(
        claim,
        [
            Statement("PTQ's loss on other text is over the threshold", ptq, at, low=loss, margin=loss),
            Statement("the recipe's is lower than PTQ's", gain, at, high=0, margin=loss),
        ],
    )


CLAIMS = {  # by their keys in experiments/claims.yaml
    "saturation": _saturation,
    "best": _best,
    "forgetting": _forgets,
    "orthogonal": _orthogonal,
    "necessary_max_window": partial(_necessary, scaling={"most_recent": 1, "max w64": -1}),
    "necessary_warmup": partial(_necessary, warmup={"0": 1, "5 %": -1}),
    "necessary_low_rate": partial(_necessary, lr={"1e-4": 1, "1e-5": -1}),
    "sufficient_w8a8": partial(_sufficient, mode="w8a8"),
    "sufficient_bf16": partial(_sufficient, mode="bf16"),
    "qat": _qat,
}
