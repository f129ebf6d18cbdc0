"""Losses on held-out text while a run trains: what they are, when, and that they leave no trace."""

from __future__ import annotations

import math

import pytest
import torch

from qat.cli import runner
from qat.data import packing
from qat.errors import UserError
from qat.models.load import load_model
from qat.models.loss import token_losses
from qat.quant.convert import convert
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.train import checkpoint, loop
from qat.train.step import Trainer
from qat.train.validation import Validator
from qat.utils import device
from tests.helpers.steps import stopped

BOTH = pytest.mark.usefixtures("arithmetic")

SMALL = ("model.blocks=3", "model.architecture.num_hidden_layers=3", "quant.bf16_blocks=1")
SMALL += ("budget.accumulation=1", "budget.steps=6")
PAPER = ("experiment=exp8", *SMALL)
RELEASED = ("experiment=exp3", "protocol=released", "+model.architecture.attention_dropout=0.1", *SMALL)
OBSERVING = ("experiment=exp8", "scaling.discard_after_warmup=false", "warmup.bf16=0.5", *SMALL)
CURRENT = ("experiment=exp8", "scaling=current", *SMALL)
ALL = pytest.mark.parametrize(
    "words", [PAPER, RELEASED, OBSERVING, CURRENT], ids=["paper", "released", "observing", "current"]
)


def validated(run: Run) -> list[dict]:
    return [row for row in run.telemetry() if "text" in row]


def files(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.checkpoints.rglob("*.safetensors")}


@BOTH
@ALL
def test_a_run_with_validation_is_the_run_without_bit_for_bit(configure, tmp_path, words):
    runs = [loop.train(configure(tmp_path / other, *words, f"validation={other}")) for other in ("wikipedia", "none")]
    assert files(runs[0]) == files(runs[1]) and runs[0].id == runs[1].id
    losses, plain = ([(row["loss"], row["grad_norm"]) for row in run.metrics()] for run in runs)
    assert losses == plain
    assert validated(runs[0]) and not validated(runs[1])


@pytest.fixture
def trained(config):
    """trained(words, steps): (trainer, validator, bank, model) after so many steps."""

    def make(words, steps):
        cfg = config(*words)
        torch.manual_seed(0)
        model, tokenizer = load_model(cfg.model, 0)
        bank, _ = convert(model, cfg)
        trainer, stream = Trainer(model, bank, cfg), packing.training_stream(cfg.data, 0, tokenizer)
        for number in range(1, steps + 1):
            trainer.step(number, [stream.micro_batch(cfg.batch[0], cfg.budget.seq_len)])
        return trainer, Validator(trainer, tokenizer, cfg), bank, model

    return make


@BOTH
@ALL
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_validation_leaves_bank_gradients_random_numbers_and_mode_as_they_are(trained, words, steps):
    trainer, validator, bank, model = trained(words, steps)
    amaxes = dict(zip(bank.names, bank.amaxes, strict=True))
    state = {**bank.state_dict(), **amaxes, "rng": device.rng_state()["cpu"]}
    state |= dict(model.named_parameters())
    state |= {f"{name}.grad": value.grad for name, value in model.named_parameters() if value.grad is not None}
    before, phase = {name: value.clone() for name, value in state.items()}, (bank.quantizing, bank.recording)
    assert len(validator.rows(0)) == 2
    now = {**state, "rng": device.rng_state()["cpu"]}
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert (bank.quantizing, bank.recording) == phase and all(module.training for module in trainer.losses.modules())


def test_validation_after_a_first_step_that_failed_leaves_the_next_one_its_amaxes(trained):
    banks = []
    for probing in (False, True):
        trainer, validator, bank, model = trained(PAPER, 0)
        tokens = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(0))
        first = trainer.first_quantized_step
        failing = model.lm_head.register_forward_hook(lambda _, __, logits: logits * math.nan)
        assert not trainer.step(first, [tokens]).finite
        failing.remove()
        if probing:
            assert validator.rows(0)
        trainer.step(first + 1, [tokens])
        banks.append({name: tensor.clone() for name, tensor in bank.state_dict().items()})
    torch.testing.assert_close(banks[1], banks[0], rtol=0, atol=0)
    assert (banks[0]["scale"] != 1).all()


@BOTH
def test_the_loss_is_that_of_the_next_token_as_the_model_trains(trained):
    for words in (PAPER, RELEASED):
        pretrained = {row["text"]: row["loss"] for row in trained(words, 0)[1].rows(0)}
        _, validator, bank, model = trained(words, 3)
        assert bank.quantizing
        losses = {row["text"]: row["loss"] for row in validator.rows(0)}
        for name, (tokens, *_) in validator.texts.items():
            with torch.no_grad(), device.autocast(device.resolve_arithmetic("auto")):
                bank.freeze()
                quantized = token_losses(model.eval(), tokens).mean().item()
                bank.quantizing = False
                assert losses[name] == pytest.approx(quantized, abs=1e-6) != token_losses(model, tokens).mean().item()
            assert losses[name] != pretrained[name]


def test_run_and_baseline_are_validated_at_the_same_steps_and_begin_alike(config):
    cfg = config(*PAPER, "warmup.bf16=0.4", "budget.telemetry_every=4")
    rows = [validated(run) for run in runner.train_with_baseline(cfg)]
    for of_run in rows:
        assert [(row["step"], row["text"]) for row in of_run] == [
            (step, text) for step in (0, 4, 6) for text in ("embedded", "wikipedia")
        ]
        assert {row["tokens"] for row in of_run} == {128} and len({row["text_hash"] for row in of_run}) == 2
    assert rows[0][:2] == rows[1][:2] and rows[0][4:] != rows[1][4:]


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_stopped_before_or_after_its_first_checkpoint_has_each_row_once(config, number):
    cfg = config(*PAPER, "budget.checkpoint_every=2", "budget.telemetry_every=2")
    run = stopped(cfg, number)
    assert {row["step"] for row in validated(run)} == set(range(0, number, 2))
    loop.train(cfg)
    assert [row["step"] for row in validated(run)] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert checkpoint.latest(run.checkpoints)[1]["step"] == cfg.steps


def test_another_text_can_be_named_and_renames_no_run(configure, config, texts, tmp_path):
    plain = config(*PAPER, "validation=none")
    cfg = config(*PAPER, **{"validation.name": "mine", "validation.source": "files", "validation.path": str(texts)})
    assert run_id(cfg) == run_id(plain) and run_id(baseline_of(cfg)) == run_id(baseline_of(plain))
    assert {row["text"] for row in validated(loop.train(cfg))} == {"embedded", "mine"}
    assert Run.of(cfg).typed_config().validation.name == "mine"


def test_a_text_that_is_not_there_is_said_in_one_line(config):
    cfg = config(*PAPER, **{"validation.name": "mine", "validation.source": "files", "validation.path": "nowhere"})
    with pytest.raises(UserError, match=r"^validation.path=nowhere: needs a folder.*; or go without: validation=none$"):
        loop.train(cfg)


def test_a_model_that_gets_worse_at_another_text_is_warned_of(config):
    cfg = config(*PAPER, "optim.lr=0.3", "optim.lr_warmup=0", "budget.telemetry_every=1")
    run = loop.train(baseline_of(cfg))
    first, *_ = [row for row in run.warnings() if row.get("kind") == "forgetting"]
    rise = {row["step"]: row["loss"] for row in validated(run) if row["text"] == "wikipedia"}
    assert first["size"] == rise[first["step"]] - rise[0] > 0.22
    assert f"held-out loss on wikipedia is {first['size']:+.2f} ± 0.12 nats a token from" in first["warning"]
