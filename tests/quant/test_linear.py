"""The quantized linear: exact when it should be the original, and equal to the formulas when it quantizes."""

import copy

import pytest
import torch
from torch import nn

from qat.config import Config, QuantConfig, ScalingConfig
from qat.quant.convert import convert, quantized_linears
from qat.quant.formats import FORMATS, TOLERANCE, to_e4m3
from qat.quant.kernels import dispatch
from qat.quant.linear import draw_to_grid, forget_rounded_weights, round_weights
from qat.quant.matmul import Matmul, Rounded
from qat.utils import device


@pytest.fixture(autouse=True, params=["fp32", "bf16"])
def arithmetic(request):
    """Set what products are computed in, as in a training step."""
    with device.autocast(request.param):
        yield request.param


def assert_close(actual: torch.Tensor, exact: torch.Tensor, arithmetic: str) -> None:
    """In BF16 a product, its unscaling and the sum with the bias are each rounded to 8 bits."""
    rtol, atol = (1e-6, 1e-6) if arithmetic == "fp32" else (3 * 2**-8, 2**-8 * exact.abs().max().item())
    torch.testing.assert_close(actual.float(), exact, rtol=rtol, atol=atol)


class Block(nn.Module):
    def __init__(self, hidden=16, inner=32):
        super().__init__()
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, inner, bias=False),
                "up_proj": nn.Linear(hidden, inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=True),
            }
        )
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(hidden, hidden)})

    def forward(self, x):
        x = x + self.self_attn["q_proj"](x)
        return x + self.mlp["down_proj"](torch.relu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))


class Model(nn.Module):
    def __init__(self, blocks=8, inner=32):
        super().__init__()
        self.layers = nn.ModuleList(Block(inner=inner) for _ in range(blocks))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def config(algo="most_recent", **quant) -> Config:
    cfg = Config(quant=QuantConfig(**{"format": "hif8"} | quant), scaling=ScalingConfig(algo=algo, window=4))
    cfg.budget.steps = 10
    cfg.model.name = "toy"
    return cfg


def single(dtype=torch.float32, algo="current", **quant):
    """One quantizing linear of 16 -> 32, with its bank at step 1."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(16, 32)})})])
    model.to(dtype)
    bank, _ = convert(model, config(algo, scope=["mlp.up_proj"], bf16_blocks=0, **quant))
    bank.begin_step(1, 1)
    return next(iter(quantized_linears(model).values())), bank


def rounded(t: torch.Tensor, target=15.0, overflow="clip", format="hif8") -> tuple[torch.Tensor, float]:
    """(values, scale) of a tensor in the dtype of products."""
    t = t.detach().to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else t.detach()
    scale = torch.tensor(target) / t.abs().max().float()
    return FORMATS[format].quantize(t.float() * scale, overflow, target), scale


def data(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 5, 16, generator=generator).to(dtype).requires_grad_()
    return x, torch.randn(3, 5, 32, generator=generator).to(dtype)


def backward(linear, x: torch.Tensor, upstream: torch.Tensor) -> None:
    y = linear(x)
    y.backward(upstream.to(y.dtype))


def train_step(model, x):
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["quant=bf16", "BF16 warmup", "BF16 warmup, its history kept"])
def test_unquantized_is_the_original_bit_for_bit(how, dtype):
    torch.manual_seed(0)
    original = Model().to(dtype)
    converted = copy.deepcopy(original)
    cfg = config(format="none" if how == "quant=bf16" else "hif8")
    cfg.scaling.discard_after_warmup = how != "BF16 warmup, its history kept"
    bank, _ = convert(converted, cfg)
    assert (bank is None) == (how == "quant=bf16")
    x = torch.randn(2, 3, 16).to(dtype)
    if bank is not None:
        bank.begin_step(1, first_quantized_step=2)
        assert len(quantized_linears(converted)) == 9
    for ours, theirs in zip(train_step(converted, x), train_step(original, x), strict=True):
        assert torch.equal(ours, theirs)
    if bank is not None:  # what is thrown away afterwards is not looked at
        assert all(amax > 0 for amax in bank.amaxes) == bank.recording == any(amax > 0 for amax in bank.amaxes)
        assert bank.recording != cfg.scaling.discard_after_warmup


@pytest.mark.parametrize("format", FORMATS)
def test_forward_and_backward_follow_the_formulas(format, arithmetic):
    linear, _ = single(format=format)
    x, upstream = data()
    y = linear(x)
    y.backward(upstream.to(y.dtype))
    (qx, sx), (qw, sw), (qg, sg) = (rounded(t, format=format) for t in (x, linear.weight, upstream))
    with torch.autocast("cpu", enabled=False):
        assert_close(y, qx @ qw.t() / (sx * sw) + linear.bias, arithmetic)
        assert_close(x.grad, qg @ qw / (sg * sw), arithmetic)
        assert_close(linear.weight.grad, qg.flatten(0, 1).t() @ qx.flatten(0, 1) / (sg * sx), arithmetic)
        assert_close(linear.bias.grad, upstream.flatten(0, 1).sum(0), arithmetic)


def test_bf16_operands_are_the_rounded_values():
    linear, _ = single(torch.bfloat16)
    x, _ = data(torch.bfloat16)
    y = linear(x)
    (qx, sx), (qw, sw) = rounded(x), rounded(linear.weight)
    exact = qx.double() @ qw.double().t() / (sx * sw).double() + linear.bias.double()
    assert y.dtype == torch.bfloat16
    # Only the product's own rounding to BF16, its unscaling and the bias may differ from the exact result.
    torch.testing.assert_close(y.double(), exact, rtol=3 * 2**-8, atol=2**-7)


def test_descaled_operands(arithmetic):
    linear, _ = single(operands="descaled")
    x, _ = data()
    y = linear(x)
    operands = [values / scale for values, scale in (rounded(x), rounded(linear.weight))]
    if arithmetic == "bf16":
        operands = [operand.bfloat16().float() for operand in operands]
    with torch.autocast("cpu", enabled=False):
        assert_close(y, operands[0] @ operands[1].t() + linear.bias, arithmetic)


@pytest.mark.parametrize("role", ["activations", "weights", "gradients"])
def test_each_role_can_be_switched_off(role, arithmetic):
    linear, bank = single(**{role: False})
    assert len(bank) == 2
    assert not any(name.endswith(role[:-1]) for name in bank.names)
    x, upstream = data()
    y = linear(x)
    y.backward(upstream.to(y.dtype))
    identity = lambda t: (t.detach().to(y.dtype).float(), torch.tensor(1.0))  # noqa: E731
    tensors = {"activations": x, "weights": linear.weight, "gradients": upstream}
    parts = {name: (identity if name == role else rounded)(t) for name, t in tensors.items()}
    (qx, sx), (qw, sw), (qg, sg) = parts["activations"], parts["weights"], parts["gradients"]
    with torch.autocast("cpu", enabled=False):
        assert_close(y, qx @ qw.t() / (sx * sw) + linear.bias, arithmetic)
        assert_close(x.grad, qg @ qw / (sg * sw), arithmetic)


def test_target_per_role():
    linear, bank = single(target_gradient=224.0, overflow="saturate")
    x, upstream = data()
    backward(linear, x, upstream)
    bank.tick()
    targets = dict(zip(bank.names, (bank.scale * bank.history[0]).tolist(), strict=True))
    assert targets["layers.0.mlp.up_proj/gradient"] == pytest.approx(224.0)
    assert targets["layers.0.mlp.up_proj/weight"] == pytest.approx(15.0)


def test_masked_ste_stops_gradients_beyond_the_target():
    x, upstream = data()
    results = {}
    for ste in ("pass_through", "masked"):
        linear, bank = single(algo="most_recent", ste=ste, gradients=False)
        for index, amax in enumerate((1.0, 100.0)):  # activations were smaller before: values beyond 1 are clipped
            dispatch.record_amax(torch.tensor(amax), bank.amax_slot(index))
        bank.tick()
        bank.begin_step(2, 1)
        x.grad = None
        backward(linear, x, upstream)
        results[ste] = x.grad.clone()
    beyond = x.detach().abs() > 1.0
    assert beyond.any()
    assert torch.equal(results["masked"][~beyond], results["pass_through"][~beyond])
    assert not results["masked"][beyond].any()
    assert results["pass_through"][beyond].all()


def test_masks_are_made_only_where_gradients_stop():
    for algo, masked in {"most_recent": ["activation", "weight"], "current": []}.items():
        linear, _ = single(algo=algo, ste="masked")
        masks = {role: quantizer(torch.ones(4, 16)).mask for role, quantizer in linear.quantizers.items()}
        assert [role for role, mask in masks.items() if mask is not None] == masked


@pytest.mark.parametrize("overflow", ["clip", "saturate"])
def test_every_rule_masks_what_is_clipped_and_nothing_in_the_first_step(overflow, arithmetic):
    """Values past the target are not clipped by saturate, and a weight may come to the target by being cast to BF16."""
    limit, masked = {"clip": 15.0, "saturate": 2.0**15}[overflow], {}
    for algo in ("most_recent", "lsq"):
        (x, upstream), (linear, bank) = data(), single(algo=algo, ste="masked", overflow=overflow, gradients=False)
        x, w = (100 * x.detach()).requires_grad_(), linear.weight
        with torch.no_grad():
            w[0, 0] = 0.2 * (1 + 2**-10)
        backward(linear, x, upstream)
        assert x.grad.all() and w.grad.all()
        bank.tick()
        bank.begin_step(2, 1)
        cast = w.detach().bfloat16() if arithmetic == "bf16" else w.detach()
        scales = {"activation": limit / (0.5 * x.detach().abs().max()), "weight": limit / cast[0, 0].float()}
        for role, scale in scales.items():
            bank.scales[bank.names.index(f"layers.0.mlp.up_proj/{role}")].fill_(scale)
        x.grad = w.grad = None
        backward(linear, x, upstream)
        for tensor, values, scale in ((x, x, scales["activation"]), (w, cast, scales["weight"])):
            beyond = (values.detach() * scale).abs() > limit * TOLERANCE
            assert beyond.any() and not tensor.grad[beyond].any() and tensor.grad[~beyond].all()
        masked[algo] = x.grad, w.grad
    assert all(map(torch.equal, *masked.values()))


@pytest.mark.parametrize("ste", ["pass_through", "masked"])
@pytest.mark.parametrize("role", ["activation", "weight"])
def test_a_scale_learns_what_finite_differences_say(role, ste):
    """Take differences of the straight-through forward pass: rounding errors stay as they are when scales change."""
    (x, upstream), (linear, bank) = data(), single(algo="lsq", ste=ste, gradients=False)
    bank.unseen, bank.recording = frozenset(), True
    w, place = linear.weight.detach(), bank.names.index(f"layers.0.mlp.up_proj/{role}")
    scales = {
        "activation": 15 / (0.5 * x.detach().abs().max()),
        "weight": 15 / (0.8 * w.abs().max()),
    }  # some are clipped
    for name, scale in scales.items():
        bank.scales[bank.names.index(f"layers.0.mlp.up_proj/{name}")].fill_(scale)

    def operand(name: str, value: torch.Tensor, size: float) -> torch.Tensor:
        value, scale = value.detach().double(), scales[name].double()
        v = value * scale
        error = FORMATS["hif8"].quantize(v.float(), "clip", 15.0) - v.clamp(-15, 15)
        return torch.where(v.abs() > 15, v.sign() * 15 * size, value + error * size)

    def objective(change: float) -> torch.Tensor:
        sizes = {name: 1 / scale.double() + (change if name == role else 0) for name, scale in scales.items()}
        return (
            operand("activation", x, sizes["activation"]) @ operand("weight", w, sizes["weight"]).t() * upstream
        ).sum()

    with torch.autocast("cpu", enabled=False):
        backward(linear, x, upstream)
    slope = (objective(1e-4) - objective(-1e-4)) / 2e-4
    count = {"activation": 16, "weight": w.numel()}[role]
    assert bank.slopes[place].item() == pytest.approx((slope / (count * 15) ** 0.5).item(), rel=1e-4)
    beyond = {"activation": x, "weight": w}[role].detach().abs() * scales[role] > 15
    gradient = {"activation": x, "weight": linear.weight}[role].grad
    assert beyond.any() and bool(gradient[beyond].any()) == (ste == "pass_through") and gradient[~beyond].all()


def test_cage_draws_weights_to_their_rounded_values():
    linear, bank = single(algo="most_recent")
    before, yes = linear.weight.detach().clone(), torch.tensor(True)
    draw_to_grid([linear], 0.25, yes)
    assert torch.equal(linear.weight, before)  # it has no scale yet
    scale = torch.tensor(12.0) / before.abs().max()  # the largest are clipped by a target of 11
    bank.scale.fill_(scale)
    bank.unseen, linear.quantizers["weight"].target = frozenset(), 11.0
    amaxes = [amax.clone() for amax in bank.amaxes]
    draw_to_grid([linear], 0.25, torch.tensor(False))
    assert torch.equal(linear.weight, before)
    draw_to_grid([linear], 0.25, yes)
    grid = FORMATS["hif8"].quantize(before * scale, "clip", 11.0) / scale
    torch.testing.assert_close(linear.weight.detach(), before - 0.25 * (before - grid), rtol=1e-6, atol=0)
    assert not torch.equal(linear.weight, before) and amaxes == bank.amaxes
    with torch.no_grad():
        linear.weight.copy_(grid)
    draw_to_grid([linear], 0.25, yes)
    assert torch.equal(linear.weight, grid)


def test_a_weight_is_rounded_ahead_or_in_every_pass(monkeypatch, arithmetic):
    linear, _ = single(algo="most_recent")
    x, upstream = data()
    calls = []
    original = dispatch.quantize
    monkeypatch.setattr(dispatch, "quantize", lambda t, *a: calls.append(tuple(t.shape)) or original(t, *a))
    backward(linear, x, upstream)
    backward(linear, x, upstream)
    assert calls.count((32, 16)) == 2
    y = linear(x)
    round_weights([linear], torch.bfloat16 if arithmetic == "bf16" else torch.float32)
    assert torch.equal(linear(x), y) and torch.equal(linear(x), y)
    assert calls.count((32, 16)) == 4
    with torch.no_grad():
        linear.weight.mul_(0.5)
    forget_rounded_weights([linear])
    assert not torch.equal(linear(x), y) and calls.count((32, 16)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_wait_for_the_backward_pass_as_codes(dtype, arithmetic):
    linear, bank = single(dtype, algo="max")
    x, _ = data(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    for operand in (x, linear.weight):
        assert [t.dtype for t in kept if t.numel() == operand.numel()] == [torch.uint8]
    wanted = torch.bfloat16 if arithmetic == "bf16" else dtype
    with bank.paused():  # where nothing waits, a weight is held as what is multiplied
        round_weights([linear], wanted)
    assert linear.rounded_weight.values.dtype is wanted and linear.rounded_weight.codes is None


def test_evaluation_and_recomputation_leave_the_bank_alone(arithmetic):
    linear, bank = single(algo="max")
    x, upstream = data()
    backward(linear, x, upstream)
    bank.tick()
    bank.begin_step(2, 1)
    with bank.paused(), torch.no_grad():
        linear(1000 * x)
    assert not torch.cat(bank.amaxes).any()
    linear(x)
    seen = dict(zip(bank.names, torch.cat(bank.amaxes).tolist(), strict=True))
    weight = linear.weight.bfloat16() if arithmetic == "bf16" else linear.weight
    assert seen["layers.0.mlp.up_proj/weight"] == weight.abs().max().item()


def test_recomputed_activations_count_once():
    from torch.utils.checkpoint import checkpoint

    banks = []
    for recompute in (False, True):
        linear, bank = single(algo="max")
        x, upstream = data()
        backward(lambda x: checkpoint(linear, x, use_reentrant=False) if recompute else linear(x), x, upstream)  # noqa: B023
        bank.tick()
        banks.append(bank.state_dict())
    assert all(torch.equal(banks[0][name], banks[1][name]) for name in banks[0])


# ----------------------------------------------------------------------------------------------------- FP8 products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_the_exact_ones_where_e4m3_holds_every_value(dtype, arithmetic):
    """No operand below 2^-12: then 16 times each is an E4M3 value, and only the order of summation may differ."""
    results = {}
    for gemm in ("bf16", "fp8"):
        linear, bank = single(dtype, gemm=gemm)
        with torch.no_grad():
            linear.weight.copy_(linear.weight.sign() * (0.1 + linear.weight.abs()))
        x, upstream = (t.detach().sign() * (0.1 + t.detach().abs()) for t in data(dtype))
        x.requires_grad_()
        pad = torch.zeros_like(x[:1, :1])  # 16 rows, as FP8 products want them
        y = linear(torch.cat([x.flatten(0, 1), pad[0]]))
        y.backward(torch.cat([upstream.flatten(0, 1), torch.zeros_like(upstream[0, :1])]))
        results[gemm] = [y.detach(), x.grad, linear.weight.grad, linear.bias.grad, torch.cat(bank.amaxes)]
    for ours, exact in zip(results["fp8"], results["bf16"], strict=True):
        # BF16 products are rounded once more when unscaled.
        tolerance = 1e-6 if dtype is torch.float32 and arithmetic == "fp32" else 2**-7
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


def test_autocast_rounds_no_fp8_product_once_more():
    """PyTorch's CPU version of it multiplies dequantized operands, through the dispatcher."""
    x, products = torch.randn(16, 64), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            codes = to_e4m3(FORMATS["hif8"].quantize(x, "clip", 15.0))
            operand = Rounded(x, codes, torch.tensor(0.37))
            products.append(Matmul(QuantConfig(format="hif8", gemm="fp8")).outputs(operand, operand, torch.bfloat16))
    assert torch.equal(*products)


def test_fp8_products_keep_bytes():
    linear, _ = single(gemm="fp8")
    x, kept = torch.randn(16, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    assert {t.dtype for t in kept if t.numel() >= x.numel()} == {torch.uint8}
