"""Replays: exact for the rule that a run had, and verdicts on planted effects."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qat.config import ROLES, ScalingConfig
from qat.errors import ConfigError, UserError
from qat.quant.rules import named
from qat.quant.scaling import ScaleBank
from qat.report import record
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.studies import replay
from qat.studies.contrasts import Estimate
from qat.studies.replay import CONTROL, HELD, LAST, LONGEST, Replayed
from qat.studies.replay_page import write_replay
from qat.train import checkpoint, loop
from qat.utils.environment import ROOT
from scripts import docs
from tests.helpers.steps import spoil

SMALL = ("experiment=exp8", "model.blocks=2", "model.architecture.num_hidden_layers=2", "quant.bf16_blocks=1")
SMALL += ("budget.accumulation=1", "budget.steps=8", "validation=none")
RECIPES = {
    "warmup kept": ("warmup.bf16=0.4", "scaling.discard_after_warmup=false", "scaling.window=3"),
    "settled and held": ("warmup=none", "scaling.settle=0.4", "scaling.update_every=3"),
    "current": ("warmup.bf16=0.3", "scaling=current"),
    "smooth": ("warmup=none", "scaling=exp_smooth", "scaling.alpha=0.3", "scaling.guard=1"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_s_own_rule_gives_its_overshoot_and_its_scales_bit_for_bit(config, monkeypatch, recipe):
    spoil((6,), monkeypatch)
    run = loop.train(config(*SMALL, *RECIPES[recipe]))
    cfg, (names, amax) = run.typed_config(), run.amaxes()
    bank = ScaleBank(names, [15.0] * len(names), cfg.scaling, cfg.settle_steps)
    overshoot = bank.replay(torch.tensor(amax), cfg.bf16_warmup_steps + 1)
    rows = run.metrics()
    assert [row["skipped"] for row in rows] == [False] * 5 + [True] + [False] * 2
    for row, values in zip(rows, overshoot, strict=True):
        if row["quantized"] and not row["skipped"]:
            share = float((values > 1 + 1e-6).float().mean())
            assert (row["overshoot_max"], row["overshoot_share"]) == (float(values.max()), share)
    saved = checkpoint.latest(run.checkpoints)[0]["scales"]
    assert all(torch.equal(saved[key], tensor) for key, tensor in bank.state_dict().items())
    names = ["most_recent", "exp_smooth:0.3", "max:3", "max:3/10+1"]
    replayed = replay.read(run.path, names)
    assert list(replayed.overshoot) == names
    assert replayed.steps.tolist() == [row["step"] for row in rows if row["quantized"] and not row["skipped"]]


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory) -> Run:
    return loop.train(configure(tmp_path_factory.mktemp("replayed"), *SMALL, "warmup=none", "quant.gradients=false"))


def test_the_command_replays_a_run_in_seconds(trained, main, tmp_path):
    code, out, err = main("replay.py", f"runs=[{trained.path}]", "replay.rules=[most_recent,exp_smooth:0.3]")
    assert code == 0, err
    assert out.startswith("replay: report/replay/replay.md")
    page = json.loads((tmp_path / "report" / "replay" / "replay.json").read_text())
    assert list(page["rules"]) == ["most_recent", "exp_smooth:0.3"]
    assert {"saturation", "damage", "hold"} == {claim["key"] for claim in page["claims"]}
    assert "What the rules cost was not measured" in page["recommendation"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["runs=null"], "runs=null: name run folders of one recipe"),
        (["runs=[{run},{run}]"], "runs: must be of one recipe with different seeds"),
        (["runs=[{run}]", "replay.tensor=up_proj"], "replay.tensor=up_proj: is no quantized tensor; "),
        (["runs=[{run}]", "replay.rules=[maxx]"], "replay.rules=maxx: unknown rule; did you mean 'max'?"),
        (["runs=[{run}]", "replay.rules=[max:0]"], "replay.rules=max:0: window must lie in [1, 65536]"),
        (["runs=[{run}]", "replay.rules=[max:x]"], "replay.rules=max:x: must be like max:64, exp_smooth:0.5"),
        (["runs=[{run}]", "replay.rules=[current:3]"], "current reads no setting; leave out :3"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(trained, main, words, says):
    code, _, err = main("replay.py", *(word.replace("{run}", str(trained.path)) for word in words))
    assert code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("tick: step", "tick: call"), "scaling.tick=call: its trace has the largest amax of a step's calls alone"),
        (("format: hif8", "format: none"), "a BF16 run predicts nothing"),
        (("algo: max", "algo: most_recent"), "its trace is of another run, or damaged: it gives an overshoot of"),
    ],
)
def test_a_run_that_its_trace_does_not_give_is_refused(trained, tmp_path, change, says):
    for path in trained.path.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace(*change))
    with pytest.raises(UserError, match=says.replace("'", ".")):
        replay.read(tmp_path, [LAST])


def test_a_name_of_a_rule_sets_what_it_names():
    scaling = ScalingConfig(algo="max", window=9, alpha=0.7, update_every=4, settle=0.1, guard=3.0)
    for name, window, alpha, every, guard in (
        ("max:64/10+2", 64, 0.7, 10, 2),
        ("exp_smooth:0.3", 9, 0.3, 1, 0),
        ("max+0.5", 9, 0.7, 1, 0.5),
    ):
        rule = named(name, scaling, "key")
        assert (rule.window, rule.alpha, rule.update_every, rule.guard, rule.settle) == (window, alpha, every, guard, 0)
    with pytest.raises(ConfigError, match="key=mx: unknown rule; did you mean 'max'"):
        named("mx", scaling, "key")


# ------------------------------------------------------------------------------------------------ planted effects


NAMES = [f"model.layers.{block}.mlp.up_proj/{role}" for block in range(3, 13) for role in ROLES]
SHARES = {LAST: 0.5, "max:4": 0.3, "max:16": 0.15, LONGEST: 0.05, HELD: 0.06}  # of tensors beyond their prediction


def invent(config, damage: dict[str, float], seeds=(0, 1, 2), steps: int = 80) -> list[Replayed]:
    """Runs whose rules cost so many nats, with noise of 0.001, and of which fewer tensors exceed a longer window."""
    draw, runs = np.random.default_rng(0), []
    for seed in seeds:
        cfg = config("experiment=exp8", seed=seed)
        loss = 3 + 0.1 * draw.random(steps // 2)
        others = {f"{key}/{role}": loss for key in ("sqnr_db", "clipped") for role in ROLES}
        others |= {"unquantized": loss, "norm_error": loss}
        shadow = {
            rule: {
                "loss": loss + size + draw.normal(0, 0.001, len(loss)),
                "cosine": 0.98 + 0.01 * (rule == LONGEST) + draw.normal(0, 0.001, len(loss)),
                **others,
            }
            for rule, size in damage.items()
        }
        over = {rule: np.where(draw.random((steps, len(NAMES))) < share, 1.3, 0.7) for rule, share in SHARES.items()}
        about = Run(f"runs/{run_id(cfg)}"), cfg, NAMES, np.arange(1, steps + 1)
        runs.append(Replayed(*about, over[LAST], over, shadow))
    return runs


SAME = {LAST: 0.02, "max:16": 0.02, LONGEST: 0.02, HELD: 0.02}


@pytest.mark.parametrize(
    ("damage", "verdicts", "says"),
    [
        (SAME, "contradicted, contradicted", "It does not matter"),
        (SAME | {LONGEST: -0.02}, "supported, supported", "Use max:64: max:64 less most_recent"),
        (SAME | {HELD: 0.1}, "contradicted, supported", "Any rule but max:64/10:"),
        ({}, "not decidable at this scale, not decidable at this scale", "was not measured"),
    ],
)
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_planted_effects_are_what_is_said(config, damage, verdicts, says, seeds):
    replayed = invent(config, damage, seeds)
    rows = replay.differences(replayed)
    saturation, *others = replay.claims(replayed)
    assert saturation["verdict"] == "supported" and saturation["statements"][0]["estimate"]["low"] < -45
    assert ", ".join(claim["verdict"] for claim in others) == verdicts
    assert says in replay.recommendation(rows, replay.margin(replayed))
    assert all(row["damage"]["low"] < damage[row["rule"]] < row["damage"]["high"] for row in rows)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [("max:4", "equivalent", 0.012), ("max:16", "harm", 0.01)],
            "Any rule but max:16: max:16 less most_recent costs +",
        ),
        (
            [("max:4", "harm", 0.03), ("max:16", "powerless", -0.01)],
            "Not decided at this length: max:16 less most_recent",
        ),
        ([(LONGEST, "undecided", 0.01), (CONTROL, "harm", 0.4)], "Not decided at this length: max:64 less most_recent"),
        ([(LONGEST, "equivalent", 0.01), (CONTROL, "harm", 0.4)], "It does not matter on these weights: max:64 less"),
        ([(LONGEST, "gain", -0.03), ("max:64+1", "gain", -0.1)], "Use max:64: max:64 less most_recent costs -0.0300 "),
        ([(CONTROL, "harm", 0.4)], "was not measured"),
    ],
)
def test_the_recommendation_quotes_the_rule_that_it_rests_on(rows, says):
    rows = [
        {"rule": rule, "first": LAST, "decision": word}
        | {"change": vars(Estimate(value, value - 0.005, value + 0.005, 0.01, 3, "seeds"))}
        for rule, word, value in rows
    ]
    assert says in replay.recommendation(rows, 0.0155)


def test_the_rules_to_try_are_those_of_the_docs():
    assert f"scaling.shadow=[{','.join(replay.TO_TRY)}]" in (ROOT / "docs" / "results.md").read_text()


def test_a_record_and_the_docs_can_read_what_was_replayed(config, tmp_path, monkeypatch):
    replayed = invent(config, SAME)
    write_replay(replayed, NAMES[0], tmp_path / "experiments" / "replay")
    runs = {run_id(cfg) for one in replayed for cfg in (one.cfg, baseline_of(one.cfg))}
    assert record.of_studies(tmp_path / "experiments") == runs and len(runs) == 6
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    shown = docs.claims(tmp_path / "experiments" / "replay" / "replay.json")
    assert "3, seeds 0, 1, 2, under max; unknown; [all of it](replay/replay.md)" in shown and "contradicted" in shown


def test_the_page_has_the_recommendation_and_every_rule(config, tmp_path):
    write_replay(invent(config, SAME), NAMES[0], tmp_path)
    page = json.loads((tmp_path / "replay.json").read_text())
    text = (tmp_path / "replay.md").read_text()
    assert page["recommendation"] in text and (tmp_path / "replay.png").exists()
    assert [row["rule"] for row in page["shadow"]] == list(SAME)
    turned = {row["rule"]: row["turned"] for row in page["shadow"]}
    assert turned[LAST] is None and turned["max:16"]["low"] <= 0 <= turned["max:16"]["high"]
    assert turned[LONGEST]["low"] < 0.01 < turned[LONGEST]["high"] and turned[LONGEST]["low"] > 0.005
    assert "\n- max:64+8 less max:64, a prediction 256 times too large: not run\n" in text
    assert " p is against" not in text and "% each, of 95 % together" in text and "Margin: 0.5 % of the loss." in text
    beyond = [row["beyond"]["value"] for row in page["rules"].values()]
    assert beyond == pytest.approx([100 * share for share in SHARES.values()], abs=6)
    assert all(len(row["blocks"]) == 10 and row["roles"].keys() == set(ROLES) for row in page["rules"].values())


def test_a_control_that_was_run_says_what_it_cost(config):
    for claim in replay.claims(invent(config, SAME | {CONTROL: 0.42}))[1:]:
        assert "256 times too large: +0.4" in claim["control"] and claim["control"].endswith("] nats")
