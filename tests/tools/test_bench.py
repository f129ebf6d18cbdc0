"""The benchmark: what it compares is comparable, and its table says what was measured."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qat.errors import ConfigError
from qat.models.load import load_model
from qat.quant.formats import FORMATS
from qat.tools.bench import products, steps, table, timing
from qat.tools.bench.plain import fake_quantize

bmm, baddbmm = torch.ops.aten.bmm, torch.ops.aten.baddbmm


def test_the_plain_comparator_rounds_as_we_do():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 0, 20_000)
    history: list[float] = []
    for factor in (1.0, 3.0, 0.1):  # the first by its own amax, then by the largest so far, clipped
        scale = torch.tensor(15.0) / (max(history) if history else x.abs().max())
        ours = FORMATS["hif8"].quantize(factor * x * scale, "clip", 15.0) / scale
        torch.testing.assert_close(fake_quantize(factor * x, history), ours, rtol=1e-6, atol=1e-12)
    assert len(history) == 3


def test_fp8_products_have_exact_operands_and_inexact_sums():
    pytest.importorskip("mmaemu")
    error = products.errors(576, spread=0.0)
    assert error["operands in E4M3, exact sum"] == 0
    sums = [error[how] for how in ("FP32 sum", "FP8 on an H100", "FP8 on an H100, fast accumulation")]
    assert 0 < 1000 * sums[0] < sums[1] < sums[2] < error["exact, rounded to BF16"]
    assert products.errors(576, spread=2.0)["operands in E4M3, exact sum"] > 1e-6  # those below 2^-12


def test_ratios_are_of_the_same_round():
    assert timing.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b") == (2.0, 1.0, 3.0)


@pytest.mark.slow
def test_memory_is_that_of_the_work_alone():
    held = torch.ones(2**26)  # 256 MiB in this process, which the other must not count
    small, large = (timing.peak_memory(torch.ones, size) for size in (1, 2**26))
    assert held.numel() * 4 * 0.9 < large - small < held.numel() * 4 * 1.5


def test_the_table_holds_what_was_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_ELEMENTS", {"cpu": 2**14})
    cfg = config("experiment=exp8", "bench.parts=[steps,kernels]", "bench.rounds=2", f"bench.out={tmp_path}")
    cfg.bench.steps = ["mlp", "all", "all, plain PyTorch"]
    page = table.measure(cfg).read_text()
    rows = {row["what"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    wanted = {"step: bf16 : bf16", "step: mlp : bf16", "step: all : bf16", "step: all, plain PyTorch : bf16"}
    assert wanted | {"evaluation: W8A8, all : bf16", "shadow of one rule : step, all linears"} <= rows.keys()
    assert sum(name.startswith("kernel: ") for name in rows) == 6
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows.values())
    assert rows["step: bf16 : bf16"]["median"] == 1 and rows["step: all : bf16"]["median"] != 1
    assert all(name in page for name in rows) and "torch " in page


def test_all_variants_train_the_same_parameters(config):
    cfg = config("experiment=exp8")
    model, _ = load_model(cfg.model, cfg.seed)
    made = steps.Steps(cfg, model)
    ours = {id(parameter) for parameter in model.parameters()}
    assert set(made.trainers) >= {"bf16", "mlp", "all", "all, current scaling", "all, plain PyTorch"}
    for trainer in made.trainers.values():
        assert {id(parameter) for parameter in trainer.model.parameters()} == ours
    assert len(made.coverage["all"].linears) == 7 * 8 and len(made.coverage["mlp"].linears) == 3 * 3


def test_attention_is_counted_by_its_heads_which_may_be_wider_than_the_model(config):
    cfg = config("quant=bf16", **{"bench.steps": []})
    cfg.model.architecture |= {"num_attention_heads": 2, "head_dim": 3 * cfg.model.architecture["hidden_size"]}
    model, _ = load_model(cfg.model, cfg.seed)
    counter = FlopCounterMode(display=False)
    model.set_attn_implementation("eager")  # whose two products the counter knows
    with counter:
        model(torch.zeros(1, cfg.budget.seq_len, dtype=torch.int64)).logits.sum().backward()
    attention = sum(counter.get_flop_counts()["Global"].get(product, 0) for product in (bmm, baddbmm))
    made = steps.Steps(cfg, model)
    of_linears = 6 * made.coverage["bf16"].matmul_parameters
    # Half of it is masked; rotary angles are a small product too.
    assert (table._flops(made) - of_linears) * cfg.budget.seq_len == pytest.approx(attention / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("parts", "chosen", "said"),
    [
        ("step", "all", "bench.parts=step: unknown part; did you mean 'steps'?"),
        ("memory", "mpl", "bench.steps=mpl: unknown step; did you mean 'mlp'?"),
        ("memory", "all, plain PyTorch", "bench.parts=['memory'] do not measure it; add the part steps"),
        ("kernels", "mlp", "bench.parts=['kernels'] do not measure it; add the part steps"),
        ("steps", "all, fp8 products", "bench.steps=all, fp8 products: cannot run here (FP8 needs a GPU"),
    ],
)
def test_what_would_not_be_measured_is_refused_before_anything_is(config, tmp_path, parts, chosen, said):
    cfg = config(f"bench.out={tmp_path / 'out'}")
    cfg.bench.parts, cfg.bench.steps = [parts], [chosen]
    with pytest.raises(ConfigError, match=re.escape(said)):
        table.measure(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_is_measured_of_each_step_that_is_asked_for(config, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "peak_memory", lambda _, cfg: 3 if cfg.scaling.algo == "max" else 2)
    cfg = config("experiment=exp8", "bench.parts=[memory]", f"bench.out={tmp_path}")
    cfg.bench.steps = ["all", "all, current scaling"]
    table.measure(cfg)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["what"]: row["median"] for row in rows} == {
        "peak memory: all : bf16": 1.5,
        "peak memory: all, current scaling : bf16": 1,
    }
