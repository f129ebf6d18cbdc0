"""The registered claims: what the file must have, and that the studies read it."""

import copy
import dataclasses
import itertools
import math

import pytest
import yaml

from qat.analysis import decisions
from qat.analysis.measures import MEASURES
from qat.cli.experiments import variant
from qat.errors import UserError
from qat.runs import archive
from qat.studies import audit, decide, design, factorial, measures
from qat.studies.registration import CLAIMS, registration
from qat.utils.environment import ROOT
from tests.conftest import composing
from tests.helpers.planned import planned
from tests.helpers.studies import invent

TREE = yaml.safe_load(CLAIMS.read_text())
KEYS = tuple(TREE["audit"]["claims"])


def test_the_claims_of_both_studies_are_registered():
    assert len(factorial.registered().claims) == 10 and len(audit.registered().claims) == 5
    assert factorial.registered().seeds == list(range(8)) and audit.registered().seeds == [0, 1, 2, 3]
    assert audit.registered().claims["clipping"].margins == {"heldout_loss": 0.5}
    assert factorial.registered().claims["saturation"].margins == {"overshoot": None, "clipped": None}


def test_reports_have_the_margins_of_the_claims():
    assert TREE["margins"] == {"loss": decisions.APE_THRESHOLD, "score": decisions.DROP_THRESHOLD}
    assert (MEASURES["bits_per_byte"].margin, MEASURES["accuracy"].margin) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("audit", "claims", "modes", "contrl"), "none", "audit: modes: unknown key contrl; did you mean 'control'?"),
        (("audit", "claims", "modes", "control"), None, "audit: modes: the key control is missing"),
        (
            ("audit", "claims", "modes", "control"),
            "labls",
            "audit: modes: unknown control labls; did you mean",
        ),
        (("audit", "claims", "modes", "measures"), 3, "audit: modes: 3 should be keys with values"),
        (("audit", "claims", "modes", "measures", "loss"), {}, "audit: modes: unknown measure loss; "),
        (
            ("audit", "claims", "modes", "measures", "other_loss", "margin"),
            None,
            "the key margin is missing",
        ),
        (("audit", "claims", "modes", "measures", "other_loss", "margin"), "los", "unknown margin los; did you mean"),
        (("audit", "claims"), [], "claims.yaml: audit: [] should be keys with values"),
        (("audit", "seeds"), None, "claims.yaml: audit: the key seeds is missing"),
        (("margins",), None, "claims.yaml: the key margins is missing"),
        (("audits",), {}, "claims.yaml: unknown key audits; did you mean 'audit'?"),
        (("audit", "claims", "modes"), None, "audit: no claim modes, which qat/studies/audit.py judges"),
        (("audit", "claims", "mine"), {}, "audit: mine has no code in qat/studies/audit.py that judges it"),
    ],
)
def test_a_registration_that_is_wrong_is_refused_in_one_line(tmp_path, place, value, says):
    """None: the key is left out."""
    tree = copy.deepcopy(TREE)
    node, (*above, last) = tree, place
    for key in above:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(UserError) as error:
        registration("audit", KEYS, path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("study", [factorial, audit])
def test_a_wrong_registration_is_refused_before_anything_is_composed(study, monkeypatch):
    def refuse():
        raise UserError("claims.yaml: wrong")

    monkeypatch.setattr(study, "registered", refuse)
    with pytest.raises(UserError, match="wrong"):
        study.design([], compose=None)


def test_the_margins_are_read_from_the_file(monkeypatch):
    """0.1 nats of damage are over 0.5 % of 3.1 nats and below 5 %."""
    keys = list(itertools.product(*factorial.FACTORS.values()))
    measured, plan = invent(keys, damage=lambda key, _: 0.1), factorial.registered()
    claims = {
        key: dataclasses.replace(claim, margins={name: 10 * margin for name, margin in claim.margins.items() if margin})
        for key, claim in plan.claims.items()
        if key == "sufficient_bf16"
    }
    strict = next(claim for claim in factorial.claims(measured) if claim["key"] == "sufficient_bf16")
    monkeypatch.setattr(factorial, "registered", lambda: dataclasses.replace(plan, claims=claims))
    (wide,) = factorial.claims(measured)
    for claim, verdict, decision in ((strict, "contradicted", "harm"), (wide, "supported", "equivalent")):
        first = claim["statements"][0]
        assert (first["verdict"], first["decision"]) == (verdict, decision)
        assert first["margin"] == first["region"][1]
    assert wide["statements"][0]["margin"] == pytest.approx(10 * strict["statements"][0]["margin"])


@pytest.mark.slow
def test_what_is_registered_as_detectable_follows_from_the_record(tmp_path):
    """The noise of the laptop's factorial, at the size of `make decide`, to three digits."""
    archive.restore(ROOT / "experiments" / "records" / "2026-11-22_laptop", tmp_path)
    words = ["benchmark=letters", "budget.heldout_tokens=2048", f"runs_dir={tmp_path}"]
    with composing():
        cells = factorial.design(words, variant)
    measured, missing = measures.read(design.with_seeds(cells, range(4)))
    assert len(measured) == 80 and not missing
    documents = {"heldout_loss": 128, "other_loss": 64}
    for key, registered in factorial.registered().claims.items():
        claim, seen = factorial.CLAIMS[key](registered, measured), {}
        for statements in (claim.premises, claim.statements):
            for statement in statements:
                response, weights = statement.response, statement.weights
                often = all(cell in decide.OFTEN or cell[0] in factorial.RATES for cell, w in weights.items() if w)
                on_passages = key in decide.ON_PASSAGES and response.measure == "other_loss"
                size = (8 if often else decide.FEW), 320 if on_passages else documents.get(response.measure, 1)
                found = planned(response, weights, 1 - 0.05 / len(statements), *size)
                if found is not None:
                    found = math.exp(found) if response.log else found
                    seen[response.measure] = max(found, seen.get(response.measure, 0))
        written = {name: row["detectable"] for name, row in TREE["factorial"]["claims"][key]["measures"].items()}
        written.pop("contrast", None)  # no such questions were asked
        assert written == {name: float(f"{value:.3g}") for name, value in seen.items()}, key
