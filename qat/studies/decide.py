"""Decide the claims of the factorial and the audit with the fewest runs: the cells that statements name, and no others.

A statement is about the difference of two or four cells around the recipe, within a seed. What hides it is mostly the
noise between seeds and between documents, so hours go into seeds and held-out text rather than into the grid's other
cells. The size was chosen by the noise of `make factorial` at the laptop budget (tests/helpers/planned.py), and is
registered with what it can see in experiments/claims.yaml: every cell with the first `FEW` seeds, and exps 7 and 8, on
which several claims rest alone, with all of them. Questions, which take as long as the training, are asked of exp8 with
few. Claims that the noise between documents of another kind would leave open are judged on more of them
(benchmark=passages).
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Sequence

from qat.config import Config
from qat.runs.identity import baseline_of, run_id
from qat.studies import audit, factorial
from qat.studies.audit import PLAIN, SPLIT
from qat.studies.design import Cell, Compose, refuse, with_seeds
from qat.studies.factorial import RECIPE
from qat.studies.measures import Measured

FEW = 4  # seeds of a cell that is not one of `OFTEN`, and of questions
EXP7, EXP3 = ("max w64", "1e-4", "5 %"), ("exp3", PLAIN)
OFTEN = (RECIPE, ("exp8", PLAIN), EXP7)  # the second is the first, as the audit has it
ON_PASSAGES = ("forgetting", "necessary_low_rate", "sufficient_w8a8", "modes")  # claims
# In the order in which claims can be judged.
FACTORIAL = (
    RECIPE,
    ("most_recent", "1e-5", "5 %"),
    ("max w64", "1e-5", "0"),
    ("current", "1e-5", "5 %"),
    ("exp_smooth", "1e-5", "5 %"),
    ("most_recent", "1e-5", "0"),
    EXP7,
    ("most_recent", "1e-4", "5 %"),
    ("max w64", "1e-4", "0"),
)
AUDIT = (
    ("exp8", PLAIN),
    ("exp8", "overflow saturates"),
    ("exp8", "overflow to Inf"),
    (SPLIT, PLAIN),
    (SPLIT, "a tick a call"),
    EXP3,
    ("exp3", "labels shifted twice"),
)


def design(overrides: Sequence[str], compose: Compose, seeds: Sequence[int]) -> tuple[list[Cell], dict[str, str]]:
    """Return the cells under command-line overrides, and {switch: why it is left out}.

    Exps 8 and 7 come first, with all seeds: what leaves most claims open is the noise between seeds. The others follow
    seed by seed and baseline by baseline, with which they are compared.
    """
    refuse(overrides, ["benchmark.control"], "study")
    unasked = [override for override in overrides if not override.startswith("benchmark")]
    crossed = {cell.key: cell for cell in factorial.design([*unasked, "benchmark=text"], compose)}
    switched, left_out = audit.design([*unasked, "benchmark=text"], compose, AUDIT)
    cells = crossed | {cell.key: cell for cell in switched}
    asked = compose("exp8", [*overrides, "benchmark.control=true"], [])
    asked = Cell(asked.cfg, asked.overrides, RECIPE)
    unasked = [override for override in unasked if not override.startswith("validation")]
    passages = compose("exp8", [*unasked, "benchmark=passages"], []).cfg
    often = [one for key in OFTEN for one in (cells[key], _on_passages(cells[key], passages))]
    by_baseline = defaultdict(list)
    for key in (*FACTORIAL, *AUDIT):
        if key in cells and key not in OFTEN:
            by_baseline[run_id(baseline_of(cells[key].cfg))].append(cells[key])
    others = [*itertools.chain(*by_baseline.values()), _on_passages(cells[EXP3], passages)]
    first = [cell for seed in seeds for cell in with_seeds([*often, *[asked] * (seed in seeds[:FEW])], [seed])]
    return first + with_seeds(others, seeds[:FEW]), left_out


def _on_passages(cell: Cell, passages: Config) -> Cell:
    """Return the same run, scored on the text of `passages`."""
    cfg = copy.deepcopy(cell.cfg)
    cfg.benchmark, cfg.validation = copy.deepcopy((passages.benchmark, passages.validation))
    words = ["benchmark=passages" if word == "benchmark=text" else word for word in cell.overrides]
    return Cell(cfg, [word for word in words if not word.startswith("validation")], cell.key)


def claims(measured: Sequence[Measured], exp8: Cell) -> list[dict]:
    """Judge the claims of both studies by what was measured of their cells (`qat.studies.contrasts.Claim`)."""
    asked = {(m.key, m.seed): m for m in measured if m.scored["baseline"].answers}
    passages = [m.with_answers(asked.get((m.key, m.seed))) for m in measured if m.benchmark == "passages"]
    judged = _judge([m for m in measured if m.benchmark != "passages"], exp8)
    more = {claim["key"]: claim for claim in _judge(passages, exp8) if claim["key"] in ON_PASSAGES}
    return [more.get(claim["key"], claim) for claim in judged]


def _judge(measured: Sequence[Measured], exp8: Cell) -> list[dict]:
    crossed, switched = ([m for m in measured if m.key in keys] for keys in (FACTORIAL, AUDIT))
    return [*factorial.claims(crossed), *audit.claims(switched, exp8.cfg)]
