"""Every setting of quantization and of the optimizer changes a loss, a scale or a weight of a short run by each value.

A setting added later needs a row here.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qat.cli.validate import CHOICES
from qat.config import Config
from qat.models.load import load_model
from qat.quant.convert import convert
from qat.train.step import Trainer

GROUPS = ("optim", "quant", "scaling", "loss")
WORDS = ("experiment=exp7", "model.blocks=3", "model.architecture.num_hidden_layers=3", "budget.steps=4")
WORDS += ("quant.bf16_blocks=1",)
BASE = {
    "budget.arithmetic": "fp32",
    "budget.micro_batch": 1,
    "budget.accumulation": 2,
    "budget.seq_len": 16,
    "warmup.bf16": 0.0,
    "optim.lr": 1e-2,
}
WARMED_UP = {"warmup.bf16": 0.5, "scaling.discard_after_warmup": False}
# key -> its other values, and what they need beside them
ROWS = {
    "optim.lr": ((1e-3,), {}),
    "optim.beta1": ((0.5,), {}),
    "optim.beta2": ((0.5,), {}),
    "optim.eps": ((1e-3,), {}),
    "optim.weight_decay": ((0.0,), {}),
    "optim.clip": ((1e-3,), {}),
    "optim.lr_warmup": ((0.5,), {}),
    "optim.lr_from_zero": ((True,), {}),
    "optim.max_skipped": ((1,), {}),
    "optim.master_weights": ((False,), {}),
    "optim.pure_bf16": ((True,), {"optim.master_weights": False, "budget.arithmetic": "bf16"}),
    "optim.moments": (("bf16", "hif8"), {}),
    "quant.format": (("none", "fp8_e4m3", "fp8_e5m2"), {}),
    "quant.scope": ((["mlp.down_proj"],), {}),
    "quant.bf16_blocks": ((0, 2), {}),
    "quant.bf16_also": (([1],), {}),
    "quant.weights": ((False,), {}),
    "quant.activations": ((False,), {}),
    "quant.gradients": ((False,), {}),
    "quant.target_activation": ((7.0,), {}),
    "quant.target_weight": ((7.0,), {}),
    "quant.target_gradient": ((7.0,), {}),
    "quant.overflow": (("saturate", "inf"), {}),
    "quant.rounding": (("hybrid",), {}),
    "quant.ste": (("masked",), {}),
    "quant.cage": ((10.0,), {"quant.cage_silent": 0.5, "quant.cage": 1.0}),
    "quant.cage_silent": ((0.5,), {"quant.cage": 10.0}),
    "quant.operands": (("descaled",), {}),
    "quant.gemm": (("fp8",), {}),
    "scaling.algo": (("current", "most_recent", "exp_smooth", "lsq"), {}),
    "scaling.window": ((1, 2), {}),
    "scaling.alpha": ((0.9,), {"scaling.algo": "exp_smooth"}),
    "scaling.lr": ((1.0,), {"scaling.algo": "lsq"}),
    "scaling.tick": (("call",), {}),
    "scaling.sync": (("none",), {}),
    "scaling.update_every": ((2,), {}),
    "scaling.guard": ((1.0,), {}),
    "scaling.settle": ((1.0,), {}),
    "scaling.observe_in_warmup": ((False,), WARMED_UP),
    "scaling.discard_after_warmup": ((True,), WARMED_UP),
    "scaling.shadow": ((["most_recent"],), {}),
    "loss.distill": ((0.5, 1.0), {}),
}
# What one rank has no use for (tests/utils/test_distributed.py), what only looks (tests/train/test_shadow.py), and what
# ends a run (tests/train/test_loop.py).
CHANGES_NOTHING = {"scaling.sync", "scaling.shadow", "optim.max_skipped"}


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    """trained(**keys): the losses, scales and weights of a run of four steps, on the same text each time."""
    folder, done = tmp_path_factory.mktemp("keys"), {}
    batches = torch.randint(257, (4, 2, 1, 17), generator=torch.Generator().manual_seed(0))
    batches[1:] %= 16  # so that amaxes fall and rise

    def run(**keys) -> list[torch.Tensor]:
        if repr(keys) not in done:
            cfg = configure(folder, *WORDS, **BASE | keys)
            model, _ = load_model(cfg.model, seed=0)
            bank, _ = convert(model, cfg)
            trainer = Trainer(model, bank, cfg)
            losses = [trainer.step(number, list(batches[number - 1])).loss for number in (1, 2, 3, 4)]
            scales = [] if bank is None else [bank.scale]
            done[repr(keys)] = [torch.stack(losses), *scales, *(p.detach() for p in model.parameters())]
        return done[repr(keys)]

    return run


def test_every_setting_has_a_row():
    fields = {f"{group}.{field.name}" for group in GROUPS for field in dataclasses.fields(getattr(Config(), group))}
    assert set(ROWS) == fields
    for key in CHOICES.keys() & ROWS.keys():  # all but the default, with which they are compared
        assert len(set(CHOICES[key]) - set(ROWS[key][0])) == 1, key


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (values, _) in ROWS.items() for value in values])
def test_it_changes_a_loss_a_scale_or_a_weight(trained, key, value):
    beside = ROWS[key][1]
    without, with_it = trained(**beside), trained(**beside | {key: value})
    same = len(without) == len(with_it) and all(map(torch.equal, without, with_it))
    assert same == (key in CHANGES_NOTHING)


def test_masking_changes_nothing_under_current_scaling(trained):
    """No value is beyond its own amax: so masking is no part of such a run's name (`qat.runs.identity`)."""
    without, with_it = (trained(**{"scaling.algo": "current", "quant.ste": ste}) for ste in ("pass_through", "masked"))
    assert all(map(torch.equal, without, with_it))
