"""The audit: one switch a cell, each against its own baseline, and planted answers to its questions."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qat.analysis.compare import differences
from qat.cli.experiments import variant
from qat.errors import ConfigError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, identity, ptq_mode, run_id
from qat.studies import audit, measures, page
from qat.studies.audit import PLAIN, SPLIT, SWITCHES
from qat.studies.contrasts import CONTRADICTED, OPEN, SUPPORTED
from qat.studies.design import with_seeds
from tests.conftest import composing, typed
from tests.helpers.studies import WORDS, invent, write
from tests.helpers.synthetic_runs import edit

KEYS = [(base, PLAIN) for base in ("exp8", "exp3", SPLIT)] + [(base, s.name) for s in SWITCHES for base in s.bases]
LINEARS = {"MLP of all blocks": 90, "attention too": 175, "attention too, all blocks": 210}


@pytest.fixture(scope="module")
def design():
    with composing():
        return audit.design([*WORDS, "budget.micro_batch=4", "budget.accumulation=1", "protocol=paper"], variant)


def test_every_cell_is_one_switch_away_from_its_base(design):
    cells, left_out = design
    by_key = {cell.key: cell.cfg for cell in cells}
    assert set(by_key) == set(KEYS) and len(by_key) == len(cells) and not left_out
    for (base, name), cfg in by_key.items():
        if name != PLAIN:
            overrides = next(switch.overrides for switch in SWITCHES if switch.name == name)
            changed = differences(identity(by_key[base, PLAIN]), identity(cfg))
            assert set(changed) == {word.partition("=")[0] for word in overrides}, name
    assert by_key[SPLIT, PLAIN].batch == (1, 4) and by_key["exp8", PLAIN].batch == (4, 1)


def test_what_needs_ranks_is_left_out_at_those_seeds_where_one_rank_would_have_to_train_it(design, tmp_path):
    cells = with_seeds([cell for cell in design[0] if cell.key[1] in (PLAIN, "ranks not synchronized")], [0, 1])
    for cell in cells:
        cell.cfg.runs_dir = str(tmp_path)
    done = next(cell for cell in cells if cell.key[1] == "ranks not synchronized" and cell.cfg.seed == 1)
    write([done], invent([done.key]))
    kept, left_out = audit.trainable(cells, ranks=1)
    assert len(kept) == len(cells) - 1 and done in kept
    assert list(left_out) == ["exp8, ranks not synchronized, seed 0"] and "RANKS=2" in next(iter(left_out.values()))


def test_only_a_switch_of_training_has_a_baseline_of_its_own(design):
    by_key = {cell.key: cell.cfg for cell in design[0]}
    own = {
        name
        for (base, name), cfg in by_key.items()
        if run_id(baseline_of(cfg)) != run_id(baseline_of(by_key[base, PLAIN]))
    }
    training = {"labels shifted twice", "no master weights", "BF16 throughout", "learning rate from 0"}
    assert own == training | {"every micro-batch twice"}


def test_a_step_of_one_sequence_has_no_calls_to_tick(monkeypatch):
    monkeypatch.setattr(audit, "SWITCHES", [switch for switch in SWITCHES if switch.name == "a tick a call"])
    with composing():
        cells, left_out = audit.design([*WORDS, "budget.micro_batch=1", "budget.accumulation=1"], variant)
    assert [cell.key for cell in cells] == [("exp8", PLAIN), ("exp3", PLAIN)]
    assert "budget.micro_batch=2" in left_out["a tick a call"]


@pytest.mark.parametrize("word", ["protocol=released", "protocol=vendor", "quant.overflow=inf", "lr=lr1e-5"])
def test_what_the_audit_sets_is_refused_on_the_command_line(word):
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        audit.design([word], variant)


def of_scope(key) -> int:
    return LINEARS.get(key[1], 75)


def answers(**planted) -> dict[str, dict]:
    planted = {"sequences": 32, "linears": of_scope} | planted
    return judged(invent(KEYS, **planted))


def judged(measured, *words: str) -> dict[str, dict]:
    cfg = typed(Path("runs"), *WORDS, "experiment=exp8", "budget.micro_batch=4", "budget.accumulation=1", *words)
    return {claim["claim"]: claim for claim in audit.claims(measured, cfg)}


def test_the_share_of_forgetting_that_the_labels_explain():
    """0.5 nats forgotten with labels shifted twice, 0.1 with sound ones: four fifths."""

    def forgotten(key) -> float:
        return 0.5 if key == ("exp3", "labels shifted twice") else 0.1

    claim = answers(forgotten=forgotten)["The double label shift explains the forgetting at lr 1e-4"]
    more, share = claim["statements"]
    assert claim["verdict"] == SUPPORTED and more["estimate"]["value"] == pytest.approx(0.4)
    assert share["estimate"]["value"] == pytest.approx(0.8)
    nothing = answers()["The double label shift explains the forgetting at lr 1e-4"]
    assert nothing["verdict"] == CONTRADICTED and nothing["statements"][1]["text"] == "–"


def test_without_seeds_that_have_both_cells_no_share_is_explained():
    """Sound labels with seeds 0 and 1, twice-shifted ones with 1 and 2, and apart."""
    once, twice = ("exp3", PLAIN), ("exp3", "labels shifted twice")
    measured = invent([once, twice], (0, 1, 2, 3), forgotten=lambda key: 0.5 if key == twice else 0.1)
    forgetting = measures.heldout(measured, "baseline", "pretrained", other=True)
    assert audit.explained(forgetting, once, twice, 0.95).value == pytest.approx(0.8)
    for kept in ({once: (0, 1), twice: (1, 2)}, {once: (0, 1), twice: (2, 3)}):
        some = [m for m in measured if m.seed in kept[m.key]]
        some = measures.heldout(some, "baseline", "pretrained", other=True)
        assert audit.explained(some, once, twice, 0.95) is None


@pytest.mark.parametrize(("gain", "verdict"), [(0.03, SUPPORTED), (0.0, CONTRADICTED), (0.0148, OPEN)])
def test_what_clipping_costs(gain, verdict):
    """The threshold is 0.5 % of 3.1 nats: 0.0155."""

    def damage(key, seed) -> float:
        return 0.05 - gain * (key == ("exp8", "overflow to Inf"))

    claim = answers(damage=damage, noise=0.003)["Clipping at the target costs more than the threshold"]
    assert claim["verdict"] == verdict


@pytest.mark.parametrize(("power", "verdict"), [(0.6, SUPPORTED), (0.0, OPEN), (-0.6, CONTRADICTED)])
def test_the_power_of_the_number_of_linears(power, verdict):
    """Each base has a factor of its own; two per cent of noise, the same for both: four points, not eight."""
    wobble = {PLAIN: 1.02, "MLP of all blocks": 0.98, "attention too": 1.02}

    def ape(key) -> float:
        return (0.2 if key[0] == "exp3" else 0.1) * (of_scope(key) / 75) ** power * wobble.get(key[1], 1)

    claim = answers(ape=ape)["Loss APE follows the number of quantized linears"]
    (statement,) = claim["statements"]
    assert claim["verdict"] == verdict and statement["estimate"]["n"] == 4
    assert statement["estimate"]["low"] < power < statement["estimate"]["high"]
    points = [ape(("exp8", scope)) for scope in audit.SCOPES]
    line = stats.linregress(*np.log([[75, 90, 175, 210], points]))
    assert statement["estimate"]["value"] == pytest.approx(line.slope)
    half = stats.t.ppf(0.975, 2) * line.stderr
    assert statement["estimate"]["high"] == pytest.approx(line.slope + half)


def test_a_window_of_calls_is_compared_only_where_it_forgets():
    """64 calls are 16 steps of 4: a run of 17 steps, one of them in BF16, never sees its window full and moving on."""
    name, measured = "A window counted in calls is as good as one in steps", invent(KEYS)
    short, long = (judged(measured, f"budget.steps={steps}", "warmup.bf16=0.05")[name] for steps in (17, 18))
    assert long["verdict"] == SUPPORTED and short["verdict"] == OPEN
    assert short["why"] == "It was not seen that a run outlasts a window of calls (64 quantized calls; true above 64)."


def test_more_runs_of_the_same_scopes_make_their_power_no_surer():
    """Keep what a scope does beyond its number of linears, which is alike in all runs and does not average out."""
    measured = invent(KEYS, (0, 1, 2), ape=lambda key: 0.3 if key[1] == "MLP of all blocks" else 0.2, linears=of_scope)
    one = audit.power_of_linears([m for m in measured if m.seed == 0 and m.key[0] == "exp8"], 0.95)
    assert vars(audit.power_of_linears(measured, 0.95)) == pytest.approx(vars(one))
    assert one.low < 0 < one.high


def test_the_power_is_that_of_bases_with_all_scopes():
    measured = invent(KEYS, ape=lambda key: 0.2 if key[0] == "exp3" else of_scope(key) / 500, linears=of_scope)
    partly = [m for m in measured if m.key[0] == "exp8" or m.key[1] != "attention too"]
    assert audit.power_of_linears(partly, 0.95).value == pytest.approx(1)
    assert audit.power_of_linears([m for m in measured if m.key[1] == PLAIN], 0.95) is None


def test_an_effect_is_what_the_switch_changes_of_the_difference():
    key, plain = ("exp8", "gradients to 224"), ("exp8", PLAIN)
    measured = invent(
        KEYS, damage=lambda each, _: 0.02 if each == key else 0.01, ape=lambda each: 0.4 if each == key else 0.2
    )
    rows = {(row["base"], row["switch"]): row["effects"] for row in audit.effects(measured)}
    with_it, without = (next(m for m in measured if m.key == each) for each in (key, plain))
    by_hand = stats.ttest_rel(*(m.losses("w8a8") - m.losses("baseline") for m in (with_it, without)))
    found = rows[key]["Held-out loss, W8A8"]["estimate"]
    assert (found["low"], found["high"]) == pytest.approx(tuple(by_hand.confidence_interval()))
    assert found["value"] == pytest.approx(0.01, abs=0.001) and rows[key]["Held-out loss, W8A8"]["p_holm"] < 0.001
    assert rows[key]["Loss APE"]["text"] == "2.000 [-]"
    assert rows[key]["Forgetting"]["text"] == "–"  # the same baseline


def test_what_a_switch_does_to_ptq_is_blank_where_it_is_the_same_ptq():
    wider = ("exp8", "attention too")
    ptq = {"linears": of_scope, "ptq": lambda key: 0.05 if key == wider else 0.02}
    rows = {(row["base"], row["switch"]): row["effects"] for row in audit.effects(invent(KEYS, **ptq))}
    assert rows[wider]["Held-out loss, PTQ"]["estimate"]["value"] == pytest.approx(0.03)
    assert rows["exp8", "gradients to 224"]["Held-out loss, PTQ"]["text"] == "–"


def test_a_baseline_that_was_not_scored_by_ptq_is_missing(design, tmp_path):
    cells = copy.deepcopy([cell for cell in design[0] if cell.key == ("exp8", PLAIN)])
    cells[0].cfg.runs_dir = str(tmp_path)
    write(cells, invent([cells[0].key]))
    scores = Run.of(baseline_of(cells[0].cfg)).path / "eval.json"
    edit(scores, lambda record: record["quick"].pop(ptq_mode(cells[0].cfg.quant)))
    measured, missing = measures.read(cells)
    assert not measured and "by PTQ" in missing[cells[0].label] and "scripts/eval.py run=" in missing[cells[0].label]


def test_the_page_names_what_was_left_out(design, tmp_path):
    cells, left_out = copy.deepcopy(design[0]), {"exp8, ranks not synchronized, seed 0": "one rank has nobody"}
    cells = [cell for cell in cells if cell.key in (("exp8", PLAIN), ("exp8", "no master weights"))]
    for cell in cells:
        cell.cfg.runs_dir = str(tmp_path)
    write(cells, invent([cell.key for cell in cells]))
    measured, missing = measures.read(cells)
    assert len(measured) == 2 and not missing
    path = page.write_audit(measured, missing, left_out, cells[0].cfg, tmp_path / "out")
    text, kept = path.read_text(), json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (
        "- exp8, ranks not synchronized, seed 0: one rank" in text and "| 9   | no master weights | exp8 | 75" in text
    )
    assert [row["switch"] for row in kept["effects"]] == ["no master weights"] and len(kept["claims"]) == 5
    plain = text.partition("## The cells they are thrown in")[2]
    assert "Held-out loss, PTQ less baseline, nats" in plain and "| exp8" in plain
    assert (tmp_path / "out" / "audit.png").stat().st_size > 10_000
