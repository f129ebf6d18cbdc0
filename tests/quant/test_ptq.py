"""PTQ methods: what each leaves unchanged, its limits, and that the library rounds to our grid as we do."""

from __future__ import annotations

import copy
import importlib.util
import re
from typing import NamedTuple

import pytest
import torch
from torch import nn

from qat.config import Config, QuantConfig
from qat.errors import ConfigError
from qat.eval import arithmetic
from qat.eval.subject import calibration_batches
from qat.models.load import load_model
from qat.quant import hif8
from qat.quant.calibrate import Around, prepare
from qat.quant.convert import quantized_linears, same_inputs, select
from qat.quant.linear import round_weights
from qat.quant.ptq import METHODS, Calibration, rounded_to_mxfp8, rung
from qat.quant.scaling import ScaleBank
from qat.runs.identity import ptq_of

library = pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="needs the extra ptq")


class Ready(NamedTuple):
    """The tiny model in FP32, its calibration text, and its logits on that."""

    model: nn.Module
    cfg: Config
    batches: list[torch.Tensor]
    wanted: torch.Tensor

    def prepared(self, name: str) -> tuple[nn.Module, ScaleBank]:
        model = copy.deepcopy(self.model)
        return model, prepare(model, self.cfg, rung(name), self.batches)

    @torch.no_grad()
    def logits(self, model: nn.Module, bank: ScaleBank, quantize: bool) -> torch.Tensor:
        bank.quantizing, bank.recording = quantize, False
        return model(input_ids=self.batches[0]).logits


@pytest.fixture(scope="module")
def ready(configure, tmp_path_factory) -> Ready:
    cfg = ptq_of(configure(tmp_path_factory.mktemp("ptq"), "experiment=exp8", **{"budget.arithmetic": "fp32"}))
    model, tokenizer = load_model(cfg.model, cfg.seed)
    model.eval().requires_grad_(False)
    for layer in model.model.layers:  # a column that stands out, as language models have them
        layer.post_attention_layernorm.weight[5] = 30.0
    batches = list(calibration_batches(cfg, tokenizer))
    return Ready(model, cfg, batches, model(input_ids=batches[0]).logits)


def one(weight: torch.Tensor, *inputs: torch.Tensor, **quant) -> Calibration:
    """A calibration of one linear on these inputs, a batch each."""
    linear = nn.Linear(*weight.T.shape, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    settings = QuantConfig(format="hif8", **quant)
    return Calibration({"a.b": linear}, [("a.b",)], settings, lambda: [linear(x) for x in inputs])


def nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return hif8.fake_quantize((weight * scale).clamp(-15, 15)) / scale


@pytest.mark.parametrize("name", [pytest.param("smoothquant", marks=library), "rotation", "per_channel", "llm_int8:1"])
def test_what_moves_values_about_changes_no_logits_before_rounding(ready, name):
    model, bank = ready.prepared(name)
    assert any(isinstance(module, Around) for module in model.modules())
    torch.testing.assert_close(ready.logits(model, bank, quantize=False), ready.wanted, rtol=0, atol=2e-5)


OURS = [name for name, method in METHODS.items() if not method.needs_modelopt]
THEIRS = ("mse", "smoothquant", "gptq")  # awq takes seconds


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in OURS for how in ("fp32", "training", "export")]
    + [pytest.param(name, "training", marks=library) for name in THEIRS],
)
def test_every_method_rounds_and_stays_near_in_any_arithmetic(ready, name, how):
    model = copy.deepcopy(ready.model)
    arithmetic.store(model, how)
    with arithmetic.autocast(how):
        bank = prepare(model, ready.cfg, rung(name), ready.batches)
        bank.freeze()
        round_weights(quantized_linears(model).values(), arithmetic.products(how))
        logits = model(input_ids=ready.batches[0]).logits.float()
    assert 1e-4 < (logits - ready.wanted).norm() / ready.wanted.norm() < 0.1


def test_cast_calibrates_nothing(ready):
    model, bank = ready.prepared("cast")
    for linear in quantized_linears(model).values():
        scales = {role: bank.scale[linear.quantizers[role].index] for role in ("activation", "weight")}
        assert scales["activation"] == 1
        assert float(scales["weight"] * linear.weight.abs().max()) == pytest.approx(16, rel=1e-6)
    assert all(bank.names[index].endswith("gradient") for index in bank.unseen)


def test_a_running_quantile_forgets_all_but_the_newest_batch():
    x = torch.randn(4, 8)
    found = one(torch.ones(3, 8), x, 2 * x, 4 * x)
    METHODS["quantile"].prepare(found)
    largest = x.abs().max() * (0.99 * 4 + 0.01 * (0.99 * 2 + 0.01))
    assert found.scales["a.b/activation"] == pytest.approx(float(16 / largest), rel=1e-6)
    assert found.scales["a.b/weight"] == 16


def test_ofmr_chooses_the_power_of_two_with_the_least_output_error():
    torch.manual_seed(0)
    x, weight = 2.0**9 * torch.randn(32, 16), 2.0**-6 * torch.randn(8, 16)
    found = one(weight, x)
    METHODS["ofmr"].prepare(found)
    scales = torch.tensor([2.0**k for k in range(-5, 6)])
    errors = {
        "activation": [((hif8.fake_quantize(x * s) / s) @ weight.T - x @ weight.T).norm() for s in scales],
        "weight": [(x @ (hif8.fake_quantize(weight * s) / s).T - x @ weight.T).norm() for s in scales],
    }
    for role, error in errors.items():
        assert found.scales[f"a.b/{role}"] == scales[int(torch.stack(error).argmin())], role


def test_siblings_are_smoothed_alike():
    linears = {f"layers.0.mlp.{name}_proj": nn.Linear(2, 2) for name in ("gate", "up", "down")}
    groups = same_inputs(linears)
    assert groups == [tuple(linears)[:2], tuple(linears)[2:]]
    calibration = Calibration(linears, groups, QuantConfig(format="hif8"), lambda: None)
    calibration.smooth(dict(zip(linears, torch.tensor([[1.0, 2], [3, 4], [5, 5]]), strict=True)))
    seen = [run(torch.Tensor.tolist, torch.ones(2)) for run in calibration.around.values()]
    assert seen == [[2, 3], [2, 3], [5, 5]]


def test_llm_int8_is_max_where_nothing_reaches_the_threshold_and_bf16_where_all_does(ready):
    exact, between, plain, same = (
        ready.logits(*ready.prepared(name), quantize=True)
        for name in ("llm_int8:0", "llm_int8:6", "max", "llm_int8:inf")
    )
    assert torch.equal(exact, ready.wanted) and torch.equal(plain, same)
    assert not torch.equal(between, exact) and not torch.equal(between, plain)


def test_mxfp8_blocks_have_powers_of_two():
    x = torch.cat([torch.linspace(-448, 448, 32), 2.0**-20 * torch.linspace(-448, 448, 32), torch.tensor([3.3, 0.0])])
    rounded = rounded_to_mxfp8(x)
    assert torch.equal(rounded[:32], x[:32].to(torch.float8_e4m3fn).float())
    assert torch.equal(rounded[32:64], 2.0**-20 * rounded[:32])
    assert rounded[64:].tolist() == [3.25, 0.0]
    assert torch.equal(rounded_to_mxfp8(rounded), rounded)


def test_int8_weights_are_integers(ready):
    weight = next(iter(quantized_linears(ready.prepared("int8")[0]).values())).weight
    assert torch.equal(weight, weight.round()) and weight.abs().max() == 127


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smoothqant", "ptq.rungs=smoothqant: unknown method; did you mean 'smoothquant'?"),
        ("smoothquant:2", "ptq.rungs=smoothquant:2: smoothquant takes a number in [0, 1], as in smoothquant:0.5"),
        ("smoothquant:x", "ptq.rungs=smoothquant:x: smoothquant takes a number in [0, 1], as in smoothquant:0.5"),
        ("max:1", "ptq.rungs=max:1: max takes no number; write max"),
        ("fp8_e4m3:1", "ptq.rungs=fp8_e4m3:1: unknown method; did you mean 'fp8_e4m3'?"),
    ],
)
def test_a_row_that_is_none_is_refused(name, says):
    with pytest.raises(ConfigError) as error:
        rung(name)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rungs", ["cast"], "one of them max"),
        ("rungs", ["max", "max"], "different rows"),
        ("questions", ["awqq"], "ptq.questions=awqq: unknown method; did you mean 'awq'?"),
        ("sequences", 0, "ptq.sequences=0: must lie in [1, 65536]; the nearest valid value is 1"),
        ("tokens", 3, "ptq.tokens=3: must lie in [4, 1048576]; the nearest valid value is 4"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(config, key, value, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        config("experiment=exp8", **{f"ptq.{key}": value})


# ------------------------------------------------------------------------------------------- NVIDIA's library


@library
def test_the_library_calibrates_by_max_as_we_do(ready):
    from qat.quant import modelopt

    _, bank = ready.prepared("max")
    ours, model = dict(zip(bank.names, bank.scale, strict=True)), copy.deepcopy(ready.model)
    linears, decoder = select(model, ready.cfg), model.get_decoder()
    groups = same_inputs(linears)

    def run() -> None:
        for tokens in ready.batches:
            decoder(input_ids=tokens, use_cache=False)

    theirs = modelopt.weight_scales(Calibration(linears, groups, ready.cfg.quant, run), {"method": "max"})
    assert theirs == {name: scale for name, scale in ours.items() if name.endswith("/weight")}
    for group in groups:
        for name in group:
            assert torch.tensor(15.0) / linears[name].input_quantizer.amax == ours[f"{group[0]}/activation"]


@library
@pytest.mark.parametrize("overflow", ["clip", "saturate"])
def test_the_library_rounds_to_our_grid(overflow):
    from qat.quant import modelopt

    torch.manual_seed(0)
    weight = torch.randn(32, 64) * torch.exp2(torch.randint(-12, 12, (32, 64)))
    found = one(weight, torch.eye(64), overflow=overflow)
    scale = modelopt.weight_scales(found, {"method": "max"})["a.b/weight"]
    quantizer = found.linears["a.b"].weight_quantizer
    assert torch.equal(quantizer(weight), hif8.fake_quantize(weight * scale, "saturate") / scale)
    quantizer.amax = quantizer.amax / 8
    beyond = hif8.fake_quantize((weight * 8 * scale).clamp(-15, 15) if overflow == "clip" else weight * 8 * scale)
    assert torch.equal(quantizer(weight), beyond / (8 * scale))


@library
def test_smoothing_evens_weights_at_alpha_0_and_inputs_at_alpha_1():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 8) * torch.arange(1, 9), torch.randn(4, 8) / torch.arange(1, 9)
    for alpha in (0.0, 1.0):
        found = one(weight, x)
        METHODS["smoothquant"].prepare(found, alpha)
        (run,) = found.around.values()
        even = found.linears["a.b"].weight if alpha == 0 else run(lambda x: x, x)
        torch.testing.assert_close(even.abs().amax(0), torch.ones(8))


@library
def test_awq_leaves_weights_alone_that_rounding_does_not_hurt():
    """With weights of one size exponent 0 is rounding to the nearest, which is exact here."""
    torch.manual_seed(0)
    weight = torch.randn(8, 16).sign()
    found = one(weight, torch.randn(64, 16) * torch.arange(1, 17))
    METHODS["awq"].prepare(found)
    assert torch.equal(found.linears["a.b"].weight, weight)


@library
def test_awq_rounds_weights_to_better_outputs_and_keeps_those_before_rounding():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 16), torch.randn(64, 16) * torch.arange(1, 17) ** 2
    found = one(weight, x)
    METHODS["awq"].prepare(found)
    smoothed, run = found.linears["a.b"].weight, found.around["a.b"]
    torch.testing.assert_close(run(lambda x: x @ smoothed.T, x), x @ weight.T, rtol=1e-4, atol=1e-3)
    after, before = (nearest(w, 15 / w.abs().max()) for w in (smoothed, weight))
    error = (run(lambda x: x @ after.T, x) - x @ weight.T).norm()
    assert error <= (x @ before.T - x @ weight.T).norm()


@library
def test_gptq_rounds_to_the_nearest_where_columns_do_not_correlate():
    torch.manual_seed(0)
    weight = torch.randn(16, 32)
    found = one(weight, torch.eye(32))
    METHODS["gptq"].prepare(found)
    assert torch.equal(found.linears["a.b"].weight, nearest(weight, found.scales["a.b/weight"]))


@library
def test_gptq_makes_up_for_errors_where_columns_correlate():
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), torch.randn(256, 4) @ torch.randn(4, 32) + 0.1 * torch.randn(256, 32)
    found = one(weight, x)
    METHODS["gptq"].prepare(found)
    plain = nearest(weight, found.scales["a.b/weight"])
    error, rounded = ((w - weight) @ x.T for w in (found.linears["a.b"].weight, plain))
    assert error.norm() < 0.8 * rounded.norm()


@library
def test_mse_scales_have_no_larger_error_than_those_of_max():
    torch.manual_seed(0)
    for _ in range(3):
        weight = torch.randn(16, 32) ** 3
        found = one(weight, torch.eye(32))
        METHODS["mse"].prepare(found)
        scale, largest = found.scales["a.b/weight"], 15 / weight.abs().max()
        error, plain = ((nearest(weight, by) - weight).norm() for by in (scale, largest))
        assert error <= (1 + 1e-6) * plain  # halved or doubled, a scale may come to the same, but for the last digit
        assert 0.25 <= largest / scale <= 4
