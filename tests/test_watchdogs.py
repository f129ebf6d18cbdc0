"""What is warned of, and what is not."""

from __future__ import annotations

import math

import pytest
import torch

from qat import loop, watchdogs
from qat.scaling import ScaleBank
from tests.conftest import composed


def settings(*words: str):
    from qat import cli

    return cli.typed(composed(*words))


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
    said = watchdogs.first_loss(settings(), vocabulary, loss)
    assert (said is not None) == warned
    if warned:
        assert f"{loss:.2f}, {loss / math.log(vocabulary):.0%} of guessing" in said and "check model, tokenizer" in said
        asked_for = watchdogs.first_loss(settings("data.label_shift=twice"), vocabulary, loss)
        assert asked_for.endswith("data.label_shift=twice asks for it")
    assert watchdogs.first_loss(settings("model=tiny"), vocabulary, loss) is None


def test_updates_lost_to_rounding_are_noticed():
    assert watchdogs.updates(settings(), {"stored": 0.97, "bf16": 0.02, "format": 0.001}) is None
    said = watchdogs.updates(settings("optim.master_weights=false", "optim.lr=1e-5"), {"stored": 0.1, "bf16": 0.1})
    assert said.startswith("the update left 90% of the weights as they were (lr 1e-05); optim.master_weights=true or")


def test_a_history_that_stands_still_is_noticed():
    cfg = settings("window=w16")
    bank = ScaleBank(["a/weight"], [15.0], cfg)
    history = watchdogs.History(bank)
    history.begin()
    for step in range(1, 21):  # longer than the window
        bank.begin_step(step, 1)
        bank.observed.fill_(step)
        bank.commit(step)
        history.advance(1)
        assert history.check() is None
    bank.filled.fill_(5)
    assert history.check().startswith("the amax history holds 5 entries where 16 were written")


def test_a_skipped_step_is_no_lost_entry(config):
    bank = ScaleBank(["a/weight"], [15.0], config("window=w16"))
    history = watchdogs.History(bank)
    for step, sound in enumerate([True, False, True], start=1):
        bank.begin_step(step, 1)
        bank.observed.fill_(1.0)
        bank.commit(step, torch.tensor(sound))
        history.advance(int(sound))
    assert int(bank.filled) == 2 and history.check() is None


def test_a_warning_is_said_and_kept_in_the_run_folder(config, capsys):
    words = {"optim.lr": 1e-9, "optim.master_weights": False, "quant.format": "none"}
    run = loop.train(config(**words))
    said = "the update left 100% of the weights as they were"
    rows = run.warnings()
    assert [row["step"] for row in rows] == [1, 5, 9, 12] and all(said in row["warning"] for row in rows)
    assert f"warning: step 5: {said}" in capsys.readouterr().out


def test_a_sound_run_warns_of_nothing(config):
    assert loop.train(config("experiment=exp8")).warnings() == []
