"""What is warned of, and what is not."""

from __future__ import annotations

import math

import pytest

from qat.quant.rules import RULES
from qat.train import loop, monitor
from tests.conftest import composed
from tests.helpers.steps import stopped


def settings(*words: str):
    from qat.cli import entry

    return entry.typed_config(composed(*words))


@pytest.mark.parametrize(
    ("vocabulary", "loss", "warned"),
    [
        (153376, 11.38, True),  # the released code's first loss: labels shifted twice
        (153376, 2.8, False),  # a sound model of 1 B parameters on web text
        (49152, 8.2, True),  # SmolLM2-135M with labels shifted twice
        (49152, 3.6, False),
        (49152, float("nan"), False),  # counted as a skipped step
    ],
)
def test_a_pretrained_model_that_starts_near_guessing_is_noticed(vocabulary, loss, warned):
    said = texts(monitor.first_loss(settings(), vocabulary, loss))
    if warned:
        assert f"{loss:.2f}, {loss / math.log(vocabulary):.0%} of guessing" in said and "check model, tokenizer" in said
        asked_for = texts(monitor.first_loss(settings("data.label_shift=twice"), vocabulary, loss))
        assert asked_for.endswith("data.label_shift=twice asks for it")
    else:
        assert said == ""
    assert monitor.first_loss(settings("model=tiny"), vocabulary, loss) == []


def texts(found: list[dict]) -> str:
    return "\n".join(row["warning"] for row in found)


def updated(stored: float, bf16: float, format: float | None) -> list[dict]:
    return [{"step": 1, "updated": {"stored": stored, "bf16": bf16, "format": format}}]


def test_updates_lost_to_rounding_are_noticed():
    assert monitor.telemetry(settings(), updated(0.97, 0.02, 0.001), 1e-4) == []
    cfg = settings("optim.master_weights=false", "optim.lr=1e-5")
    said = texts(monitor.telemetry(cfg, updated(0.1, 0.1, 0.0), 1e-5))
    assert said.startswith("the update left 90% of the weights as they were (lr 1e-05); optim.master_weights=true or")


def test_weights_that_stay_on_their_grid_are_noticed_but_not_where_the_schedule_is_low():
    cfg = settings("optim.lr=1e-4")
    assert monitor.telemetry(cfg, updated(1.0, 0.01, 2e-6), 1e-4) == []
    assert monitor.telemetry(cfg, updated(1.0, 0.01, None), 1e-4) == []  # a baseline
    (found,) = monitor.telemetry(cfg, updated(1.0, 0.01, 0.0), 6e-5)
    assert found["kind"] == "still weights" and "to another hif8 value (lr 6e-05)" in found["warning"]
    assert monitor.telemetry(cfg, updated(0.1, 0.0, 0.0), 4e-5) == []


# -------------------------------------------------------------------------------------------------------------- texts


def losses(step: int, tokens: int = 8192, **texts: float | None) -> list[dict]:
    rows = [{"step": step, "text": name, "loss": loss} for name, loss in texts.items()]
    return [row | {"tokens": tokens, "text_hash": row["text"]} for row in rows]


def test_a_text_of_another_kind_that_rises_is_forgotten():
    cfg, pretrained = settings("optim.lr=1e-4"), losses(0, embedded=3.7, wikipedia=3.0)
    (found,) = monitor.forgetting(cfg, losses(9, embedded=3.4, wikipedia=3.15), pretrained)
    assert found["kind"] == "forgetting" and found["size"] == pytest.approx(0.15)
    assert found["warning"] == (
        "held-out loss on wikipedia is +0.15 ± 0.02 nats a token from the pretrained model's (on embedded: -0.30): it "
        "forgets; a smaller optim.lr than 0.0001 or fewer steps would keep more"
    )
    (found,) = monitor.forgetting(settings("data.label_shift=twice"), losses(9, wikipedia=6.0), pretrained)
    assert "+3.00 ± 0.02" in found["warning"] and found["warning"].endswith("something else than the next token")


@pytest.mark.parametrize(
    "now",
    [
        losses(9, embedded=3.4, wikipedia=3.09),
        losses(9, tokens=128, embedded=3.4, wikipedia=3.2),  # of so few it may be noise
        losses(9, embedded=4.4, wikipedia=2.9),  # the training data's own is judged by its curve
        losses(9, embedded=3.4, wikipedia=None),  # not finite: the step says so
        [row | {"text_hash": "of another revision"} for row in losses(9, wikipedia=4.0)],
        updated(1.0, 0.01, 0.001),
    ],
)
def test_a_text_that_is_kept_is_not_warned_of(now):
    assert monitor.forgetting(settings(), now, losses(0, embedded=3.7, wikipedia=3.0)) == []


# ------------------------------------------------------------------------------------------------------------- tensors


def tensors(role: str = "gradient", **columns: list[float]) -> list[dict]:
    """Telemetry of a step with a sound tensor for each value of a column, but for that value."""
    sound = {"overshoot": 1.0, "sqnr_db": 31.0, "beyond": 0.0, "underflow": 0.001}
    rows = zip(*columns.values(), strict=True)
    return [
        {"step": 9, "layer": f"layers.{n}.down_proj", "role": role} | sound | dict(zip(columns, row, strict=True))
        for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("overshoots", "layer"),
    [
        ([1.0] * 15 + [3.9], None),  # one tensor of many: the window was short once
        ([1.0] * 15 + [4.0], 15),  # but not by so much
        ([1.0] * 7 + [1.3, 1.4], None),
        ([1.0] * 6 + [1.4, 1.3], 6),  # a quarter of them
        ([1.24] * 8, None),
    ],
)
def test_scales_that_lag_are_noticed_with_their_layer_and_role(overshoots, layer):
    found = monitor.telemetry(settings("scaling=most_recent"), tensors(overshoot=overshoots), 1e-4)
    if layer is None:
        assert found == []
        return
    (found,) = found
    assert (found["layer"], found["role"]) == (f"layers.{layer}.down_proj", "gradient")
    assert found["kind"] == "lagging scales" and found["size"] == max(overshoots)
    late = sum(value > 1.25 for value in overshoots)
    worst = f"layers.{layer}.down_proj is {max(overshoots):.2f} times as large as predicted"
    said = f"gradient scales lag: {worst}, {late} of {len(overshoots)} tensors are over 1.25; scaling=max window=w64"
    assert found["warning"].startswith(said)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (("window=w16",), "a scaling.window larger than 16"),
        (("scaling.update_every=8",), "scaling.update_every=1 (now 8)"),
    ],
)
def test_what_helps_against_lag_depends_on_the_scaling(words, fix):
    (found,) = monitor.telemetry(settings(*words), tensors(overshoot=[9.0]), 1e-4)
    assert f"; {fix} would follow better" in found["warning"]


@pytest.mark.parametrize(
    ("column", "sound", "bad", "said"),
    [
        ("sqnr_db", [None, 18.0], [31.0, 17.9], "activation SQNR is 17.9 dB in layers.1.down_proj"),
        ("underflow", [0.0, 0.09], [0.0, 0.1], "activation underflow: 10% of layers.1.down_proj became zero"),
        ("beyond", [0.0, 0.009], [0.02, 0.03], "activation values: 3.0% of layers.1.down_proj are beyond the target"),
    ],
)
def test_noise_underflow_and_clipping_are_noticed(column, sound, bad, said):
    assert monitor.telemetry(settings(), tensors("activation", **{column: sound}), 1e-4) == []
    (found,) = monitor.telemetry(settings(), tensors("activation", **{column: bad}), 1e-4)
    assert found["warning"].startswith(said) and found["size"] > 0


def test_a_warning_is_news_once_for_a_kind_and_role_and_again_when_it_is_twice_as_bad():
    cfg, said, steps = settings("scaling=most_recent"), [], []
    for step, worst in enumerate([5.0, 4.0, 9.9, 10.0, 19.0, 20.0]):
        found = monitor.telemetry(cfg, tensors(overshoot=[worst]) + tensors("activation", overshoot=[5.0]), 1e-4)
        new = monitor.new_warnings(found, said)
        said += new
        steps += [(step, row["role"]) for row in new]
    assert steps == [(0, "activation"), (0, "gradient"), (3, "gradient"), (5, "gradient")]


# ----------------------------------------------------------------------------------------------------------- in a run


def test_a_run_whose_scales_lag_says_so_while_it_runs_and_once_across_a_resume(config, monkeypatch, capsys):
    """The predicted amaxes are a tenth of what they should be; stopped before step 8, resumed after step 4."""
    lagging = RULES["max"]._replace(predict=lambda history, scaling: history.amax(0) / 10)
    monkeypatch.setitem(RULES, "max", lagging)
    cfg = config("experiment=exp8", "optim.lr=1e-4")
    before = stopped(cfg, 8).warnings()
    printed = capsys.readouterr().out
    rows = loop.train(cfg).warnings()
    lagging = [row for row in rows if row["kind"] == "lagging scales"]
    assert {row["role"] for row in lagging} == {"activation", "weight", "gradient"}
    assert all(row["step"] == 6 and ".mlp." in row["layer"] and row["size"] > 4 for row in lagging)
    assert f"warning: step 6: {lagging[0]['warning']}" in printed
    again = [row for row in rows if row["step"] > 6]
    assert [row for row in rows if row["step"] <= 6] == before
    assert all(any(row["size"] >= 2 * old["size"] for old in before if old["kind"] == row["kind"]) for row in again)


def test_a_warning_is_said_and_kept_in_the_run_folder(config, capsys):
    words = {"optim.lr": 1e-9, "optim.master_weights": False, "quant.format": "none"}
    run = loop.train(config(**words))
    said = "the update left 100% of the weights as they were"
    rows = run.warnings()
    assert [row["step"] for row in rows] == [1] and said in rows[0]["warning"]
    assert f"warning: step 1: {said}" in capsys.readouterr().out


def test_a_sound_run_warns_of_nothing(config):
    assert loop.train(config("experiment=exp8")).warnings() == []
