"""Rules tried beside the run's own: training as without them to the bit, and numbers that are the run's where known."""

from __future__ import annotations

import pytest

from qat.cli import runner
from qat.errors import ConfigError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.train import loop
from tests.helpers.steps import stopped
from tests.helpers.torture import left

# Dropout, so that random numbers matter, and a history from the start, so that rules differ at the first quantized step
SMALL = ("experiment=exp8", "model.blocks=2", "model.architecture.num_hidden_layers=2", "quant.bf16_blocks=1")
SMALL += ("+model.architecture.attention_dropout=0.1", "budget.steps=6", "budget.checkpoint_every=2", "validation=none")
SMALL += ("warmup.bf16=0.34", "scaling.discard_after_warmup=false", "budget.telemetry_every=2", "scaling.window=3")
SHADOW = "scaling.shadow=[most_recent,max:3,max:3/10,exp_smooth:0.3,current,max:3+2]"


@pytest.fixture(scope="module")
def trained(arithmetic, configure, tmp_path_factory):
    """(a run with rules beside its own, the same without, its baseline)"""
    with_rules, without = (configure(tmp_path_factory.mktemp("runs"), *SMALL, *words) for words in ((SHADOW,), ()))
    runner.train_with_baseline(with_rules)
    return Run.of(with_rules), loop.train(without), Run.of(baseline_of(with_rules))


def tried(run: Run) -> list[dict]:
    return [row for row in run.telemetry() if "shadow" in row]


def test_trying_rules_changes_nothing(trained):
    ours, plain, _ = trained
    assert ours.id == plain.id and len(tried(ours)) == 6 * 3  # steps 3, 5 and 6
    a, b = left(ours), left(plain)
    a["telemetry"] = [row for row in a["telemetry"] if "shadow" not in row]
    assert a == b


def test_the_run_s_own_rule_and_no_quantization_have_the_losses_of_run_and_baseline(trained):
    ours, _, baseline = trained
    quantized, plain = ({row["step"]: row for row in run.metrics()} for run in (ours, baseline))
    own = [row for row in tried(ours) if row["shadow"] == "max:3"]
    assert [row["loss"] for row in own] == [quantized[row["step"]]["loss"] for row in own]
    first, norms = own[0], [rows[3]["grad_norm"] for rows in (quantized, plain)]
    assert first["step"] == 3 and first["unquantized"] == plain[3]["loss"] != first["loss"]
    assert first["norm_error"] == pytest.approx(norms[0] / norms[1] - 1, abs=1e-6)
    assert all(0.9 < row["cosine"] < 1 for row in tried(ours))


def test_rules_round_with_scales_of_their_own(trained):
    by_rule = {}
    for row in tried(trained[0]):
        by_rule.setdefault(row["shadow"], []).append(row)
    assert len({tuple(row["loss"] for row in rows) for rows in by_rule.values()}) == 6
    clipped = {rule: sum(row["clipped"]["gradient"] for row in rows) for rule, rows in by_rule.items()}
    assert clipped["current"] == 0 < clipped["most_recent"] and clipped["max:3"] <= clipped["most_recent"]
    assert all(20 < value < 40 for rows in by_rule.values() for row in rows for value in row["sqnr_db"].values())


def test_a_resumed_run_tries_the_same(trained, config):
    cfg = config(*SMALL, SHADOW)
    stopped(cfg, 6)  # a step with rules, after the checkpoint of the fourth
    assert left(loop.train(cfg)) == left(trained[0])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("budget.parallel=fsdp",), "cannot be tried with budget.parallel=fsdp; leave one of them out"),
        (("scaling.tick=call",), "cannot be tried with scaling.tick=call"),
        (("scaling.sync=none",), "cannot be tried with scaling.sync=none"),
        (("scaling.shadow=[max:4,max:4]",), "names a rule twice"),
        (("scaling.shadow=[maxx]",), "scaling.shadow=maxx: unknown rule; did you mean 'max'?"),
        (("scaling.shadow=[exp_smooth:2]",), "scaling.shadow=exp_smooth:2: alpha must lie in [0, 1]"),
    ],
)
def test_what_cannot_be_tried_is_refused(config, words, says):
    with pytest.raises(ConfigError) as caught:
        config(*SMALL, SHADOW, *words)
    assert says in str(caught.value)
