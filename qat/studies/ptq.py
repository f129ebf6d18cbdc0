"""The ladder of PTQ methods: is training in W8A8 needed, and does it matter how scales are chosen?

A row is a method of `qat.quant.ptq`, or another format, on one and the same BF16 model. It is compared with that model,
document by document and question by question, and with the row `max`. What is expected is registered in
experiments/claims.yaml, as three claims:

- ties: HiF8 has 3 mantissa bits over 7 binades, so methods that only choose scales come to what `max` comes to: the
  whole interval of the difference lies within the threshold.
- rotation: a rotation spreads outliers, which a format of 38 binades need not fear: it is not better by more than that.
- enough: `max` costs less than the threshold.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qat.analysis.answers import measure_rows
from qat.analysis.compare import heldout_row
from qat.analysis.decisions import correct
from qat.analysis.results import EvalResult, Match
from qat.config import Config
from qat.errors import ConfigError
from qat.eval.evaluate import reference_of, rung_of
from qat.eval.subject import Subject
from qat.quant.ptq import METHODS, rung
from qat.studies.contrasts import Claim, Response, Statement
from qat.studies.design import Compose, refuse
from qat.studies.registration import Registration, registration

ONLY_SCALES = ("cast", "quantile", "ofmr", "mse", "smoothquant", "awq", "per_channel")
EXPECTED = dict.fromkeys(ONLY_SCALES, "ties with max") | {"rotation": "no better than max", "max": "below the margin"}


@dataclass
class Ladder:
    """The rows of one model. cfg: the quantized run that they are without training; rows: by name."""

    cfg: Config
    overrides: list[str]
    reference: Subject
    rows: dict[str, Subject]

    def match(self, against: str | None = None) -> Match:
        """Return the scores of all rows beside those of the model in BF16, or of another row.

        Errors: UserError where scores are missing or of other text or questions.
        """
        results = {name: self._result(row) for name, row in self.rows.items()}
        reference = results[against] if against else self._result(self.reference)
        changes = {name: result.less(reference) for name, result in results.items()}
        return Match({}, results, reference, None, changes, {})

    def _result(self, subject: Subject) -> EvalResult:
        command = "make ptq, with the same settings"
        return EvalResult(subject.run, self.cfg.benchmark.name, subject.mode, command)


def design(experiment: str, overrides: Sequence[str], compose: Compose, seeds: Sequence[int]) -> list[Ladder]:
    """Return the ladder of each seed under command-line overrides. Errors: ConfigError before anything is trained."""
    registered()
    refuse(overrides, ["quant", "quant.format"], "ladder")
    job = compose(experiment, overrides, [])
    rungs = [rung(name) for name in job.cfg.ptq.rungs]
    if not job.cfg.quantized:
        raise ConfigError(f"experiment={experiment}: rounds nothing; name a quantized one, as in experiment=exp8")
    if not (job.cfg.quant.weights and job.cfg.quant.activations):
        raise ConfigError("quant.weights, quant.activations: the ladder rounds both; leave them as they are")
    if job.cfg.quant.gemm == "fp8":
        raise ConfigError("quant.gemm=fp8: rows that do not clip have values past E4M3's range; set quant.gemm=bf16")
    library = [one.name for one in rungs if METHODS[one.method].needs_modelopt]
    if library and not importlib.util.find_spec("modelopt"):
        raise ConfigError(f"ptq.rungs={library[0]}: nvidia-modelopt is not installed; pip install -e '.[ptq]'")
    formats = {one.format for one in rungs} - {None}
    configs = {name: compose(experiment, overrides, [f"quant={name}"]).cfg for name in formats} | {None: job.cfg}
    return [_ladder(configs, [*job.overrides, f"seed={seed}"], seed) for seed in seeds]


def _ladder(configs: Mapping[str | None, Config], overrides: list[str], seed: int) -> Ladder:
    """configs: by a row's format, None being the run's own."""
    configs = copy.deepcopy(configs)
    for cfg in configs.values():
        cfg.seed = seed
    cfg = configs[None]
    rows = {name: rung_of(configs[rung(name).format], rung(name)) for name in cfg.ptq.rungs}
    return Ladder(cfg, overrides, reference_of(cfg), rows)


def rows(ladders: Sequence[Ladder]) -> list[dict]:
    """Compare every row with the model in BF16 and with `max`, over the seeds; JSON-able.

    bf16, max: by text, as `qat.analysis.compare.heldout_row`; answers: by measure, as
    `qat.analysis.answers.measure_rows`, of all tasks, where the row was asked; seconds: of calibration, None where
    they were not taken. Harm and gain hold after Holm's correction over the rows of a column.
    """
    matches, beside_max = ([ladder.match(against) for ladder in ladders] for against in (None, "max"))
    texts, tasks = list(matches[0].reference.record["heldout"]), list(matches[0].reference.record["tasks"])
    compared = []
    for name in ladders[0].rows:
        asked = all(match.own[name].record["tasks"] for match in matches)
        measures = measure_rows(matches, tasks, name) if asked else []
        seconds = [match.own[name].record.get("calibration_seconds") for match in matches]
        compared.append(
            {
                "rung": name,
                "expected": EXPECTED.get(rung(name).method) if not rung(name).format else None,
                "bf16": {text: heldout_row(matches, text, name) for text in texts},
                "max": {text: heldout_row(beside_max, text, name) for text in texts if name != "max"},
                "answers": {row["measure"]: row for row in measures if row["task"] == "pooled"},
                "seconds": None if None in seconds else float(np.mean(seconds)),
            }
        )
    for column in ("bf16", "max", "answers"):
        for name in dict.fromkeys(name for row in compared for name in row[column]):
            correct([row[column][name] for row in compared if name in row[column]])
    return compared


# ---------------------------------------------------------------------------------------------------- claims


def registered() -> Registration:
    """Read what was registered before the runs."""
    return registration("ptq", CLAIMS)


def claims(ladders: Sequence[Ladder]) -> list[dict]:
    """Judge the registered claims (`qat.studies.contrasts.Claim`) whose rows were scored, on the data's own text."""
    matches, text = [ladder.match() for ladder in ladders], ladders[0].cfg.data.name
    seeds = [ladder.cfg.seed for ladder in ladders]
    losses = {
        ((name,), seed): change.losses[text]
        for seed, match in zip(seeds, matches, strict=True)
        for name, change in match.changes.items()
    }
    response = Response("Held-out loss, row less BF16", "nats", 4, losses, "documents", measure="heldout_loss")
    baseline = float(np.mean([match.reference.record["heldout"][text]["loss"] for match in matches]))
    judged = []
    for key, claim in registered().claims.items():
        margin = claim.margins["heldout_loss"] / 100 * baseline
        statements = CLAIMS[key](response, list(ladders[0].rows), margin)
        judged += [Claim(claim, statements).judge()] if statements else []
    return judged


def _less_max(what: str, response: Response, methods: Sequence[str], names: Sequence[str], **region) -> list[Statement]:
    chosen = [name for name in names if rung(name).method in methods and name != "max"]
    return [Statement(what.format(name), response, {(name,): 1, ("max",): -1}, **region) for name in chosen]


def _ties(response: Response, names: Sequence[str], margin: float) -> list[Statement]:
    region = {"low": -margin, "high": margin, "margin": margin}
    return _less_max("{} less max is within the threshold", response, ONLY_SCALES, names, **region)


def _rotation(response: Response, names: Sequence[str], margin: float) -> list[Statement]:
    region = {"low": -margin, "margin": margin}
    return _less_max("{} is not better than max by more than the threshold", response, ["rotation"], names, **region)


def _enough(response: Response, _: Sequence[str], margin: float) -> list[Statement]:
    what = "max costs less than the threshold"
    return [Statement(what, response, {("max",): 1}, high=margin, margin=margin)]


CLAIMS = {"ties": _ties, "rotation": _rotation, "enough": _enough}  # by their keys in experiments/claims.yaml
