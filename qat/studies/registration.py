"""Read what the studies test, as it was registered before their runs (experiments/claims.yaml)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from qat.errors import UserError, nearest
from qat.utils.environment import ROOT

CLAIMS = ROOT / "experiments" / "claims.yaml"
MEASURES = {  # what a claim may rest on, by name: how a page writes it
    "heldout_loss": "held-out loss, nats",
    "other_loss": "loss on text of another kind, nats",
    "contrast": "answer contrast, bits per byte",
    "batch_loss": "loss of the same batch on the same weights, nats",
    "accuracy": "accuracy, points",
    "loss_ape": "loss APE, a factor",
    "overshoot": "tensors beyond their predicted amax, points",
    "clipped": "elements beyond the target, in a million",
    "forgetting_share": "share of the forgetting",
    "linears_exponent": "exponent of the number of linears",
    "quantized_calls": "quantized calls",
}
_FILE = ("margins", "controls", "factorial", "audit", "replay", "ptq")
_STUDY = ("seeds", "texts", "questions", "cost", "claims")
_CLAIM = ("claim", "says", "measures", "control")
_MEASURE = ("margin", "detectable")


@dataclass(frozen=True)
class Registered:
    """Hold a claim before it is tested.

    claim: its sentence; says: what the paper says to it; margins: by measure, percent of the baseline's value, below
    which a difference is too small to count, None where none is set; control: a damage that is known to be there, and
    what was seen of it.
    """

    key: str
    claim: str
    says: str
    margins: Mapping[str, float | None]
    control: str


@dataclass(frozen=True)
class Registration:
    """Hold the claims of a study by key, what they are to be tested on, and the margins by name, in percent."""

    margins: dict[str, float]
    seeds: list[int]
    texts: str
    questions: str
    cost: str
    claims: dict[str, Registered]


def registration(study: str, code: Collection[str], path: Path = CLAIMS) -> Registration:
    """Read the claims of a study; code: the keys of those that it can judge.

    Errors: UserError of one line for a missing or unknown key, a claim without code, or code without a claim.
    """
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check(tree, _FILE, path.name)
    about, where = tree[study], f"{path.name}: {study}"
    _check(about, _STUDY, where)
    for key in {**_mapping(about["claims"], where), **dict.fromkeys(code)}:
        if key not in code:
            raise UserError(f"{where}: {key} has no code in qat/studies/{study}.py that judges it")
        if key not in about["claims"]:
            raise UserError(f"{where}: no claim {key}, which qat/studies/{study}.py judges")
    claims = {key: _claim(key, entry, tree, f"{where}: {key}") for key, entry in about["claims"].items()}
    return Registration(tree["margins"], about["seeds"], about["texts"], about["questions"], about["cost"], claims)


def _claim(key: str, entry: Mapping, tree: Mapping, where: str) -> Registered:
    """Read a claim; tree: the file, which has the margins and controls that it names."""
    _check(entry, _CLAIM, where)
    margins = {}
    for name, measure in _mapping(entry["measures"], where).items():
        _known(name, MEASURES, where, "measure")
        _check(measure, _MEASURE, f"{where}: {name}")
        if measure["margin"] is not None:
            _known(measure["margin"], tree["margins"], f"{where}: {name}", "margin")
        margins[name] = tree["margins"].get(measure["margin"])
    _known(entry["control"], tree["controls"], where, "control")
    return Registered(key, entry["claim"], entry["says"], margins, tree["controls"][entry["control"]])


def _check(entry: object, keys: Collection[str], where: str) -> None:
    """Raise `UserError` unless the entry has these keys and no other."""
    for key in _mapping(entry, where):
        _known(key, keys, where, "key")
    for key in keys:
        if key not in entry:
            raise UserError(f"{where}: the key {key} is missing")


def _mapping(entry: object, where: str) -> Mapping:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {entry!r} should be keys with values")
    return entry


def _known(name: str, names: Collection[str], where: str, what: str) -> None:
    if name not in names:
        raise UserError(f"{where}: unknown {what} {name}; {nearest(name, names)}")
