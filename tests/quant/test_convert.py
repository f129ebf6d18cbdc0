"""The conversion: which linears it takes, which inputs it shares, what it refuses."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from qat.errors import ConfigError
from qat.quant.convert import _check_fp8, convert, quantized_linears
from qat.quant.kernels import dispatch
from tests.quant.test_linear import Model, config, train_step


def train_all(scope: list[str]):
    """One step of a quantized Model: (its results, bank, tensors that were rounded)."""
    torch.manual_seed(0)
    model, x = Model().requires_grad_(), torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    bank, _ = convert(model, config("max", scope=scope))
    bank.begin_step(1, 1)
    shapes, original = [], dispatch.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "quantize", lambda t, *a: shapes.append(tuple(t.shape)) or original(t, *a))
        results = train_step(model, x)
    inputs = [module.input for module in quantized_linears(model).values()]
    assert inputs and all(each._source is None and each._rounded is None for each in inputs)  # nothing is held
    return results, bank, shapes


def test_an_input_that_two_linears_share_is_rounded_once(monkeypatch):
    shared = train_all(["mlp.*"])
    monkeypatch.setattr("qat.quant.convert._SAME_INPUT", ())
    apart = train_all(["mlp.*"])
    assert all(torch.equal(*pair) for pair in zip(shared[0], apart[0], strict=True))
    # Three blocks are quantized. In each, the gate and the up projection read the same [2, 3, 16].
    assert (apart[2].count((2, 3, 16)), shared[2].count((2, 3, 16))) == (6, 3)
    assert set(apart[1].names) - set(shared[1].names) == {f"layers.{i}.mlp.up_proj/activation" for i in (3, 4, 5)}
    seen = {bank: dict(zip(bank.names, torch.cat(bank.amaxes).tolist(), strict=True)) for bank in (shared[1], apart[1])}
    assert all(seen[apart[1]][name] == amax for name, amax in seen[shared[1]].items())


def test_linears_of_one_input_may_yet_read_different_tensors():
    torch.manual_seed(0)
    model = Model(blocks=1)
    bank, _ = convert(model, config("current", scope=["mlp.*"], bf16_blocks=0))
    bank.begin_step(1, 1)
    gate, up = (model.layers[0].mlp[name] for name in ("gate_proj", "up_proj"))
    x = torch.randn(4, 16)
    expected = [linear(tensor) for linear, tensor in ((gate, x), (up, x), (gate, 2 * x), (up, 2 * x))]
    mixed = [linear(tensor) for linear, tensor in ((gate, x), (up, 2 * x), (up, x), (gate, 2 * x))]
    for ours, theirs in zip(mixed, (expected[0], expected[3], expected[1], expected[2]), strict=True):
        assert torch.equal(ours, theirs)


def test_fp8_products_refuse_what_they_cannot_do(monkeypatch):
    with pytest.raises(ConfigError, match=r"quant.gemm=fp8: layers\.3\.mlp\.gate_proj is 16 -> 24, and FP8"):
        convert(Model(inner=24), config(gemm="fp8"))
    on_gpu = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")), in_features=16, out_features=16)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100")
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, known=capability: known)
        refused = pytest.raises(ConfigError, match="NVIDIA A100 has no FP8 tensor cores")
        with refused if capability < (8, 9) else contextlib.nullcontext():
            _check_fp8({"mlp.up_proj": on_gpu})


@pytest.mark.parametrize(("keep", "blocks"), [(0, range(8)), (5, range(3, 6)), (4, range(2, 6)), (1, range(1, 8))])
def test_bf16_blocks_and_coverage(keep, blocks):
    model = Model()
    _, coverage = convert(model, config(bf16_blocks=keep))
    assert {int(name.split(".")[1]) for name in coverage.linears} == set(blocks)
    assert set(coverage.linears) == set(quantized_linears(model))
    assert coverage.parameters == len(blocks) * 3 * 16 * 32
    assert coverage.all_parameters == sum(p.numel() for p in model.parameters())
    assert coverage.matmul_parameters == 8 * (3 * 16 * 32 + 16 * 16) + 16 * 5
    assert coverage.kinds()["mlp.up_proj"] == (len(blocks), len(blocks) * 16 * 32)
    together = str(coverage).splitlines()[-1].split()
    assert together[:2] == ["together", str(3 * len(blocks))]
    assert together[-1] == f"{coverage.parameters / coverage.matmul_parameters:.1%}"


def test_further_blocks_keep_bf16():
    _, coverage = convert(Model(), config(bf16_blocks=2, bf16_also=[3, 5]))
    assert {int(name.split(".")[1]) for name in coverage.linears} == {1, 2, 4, 6}
    assert "quantized, blocks 1..6 but 3, 5 " in str(coverage)


def test_parameters_keep_their_names_and_identity():
    model = Model()
    names = {name: id(p) for name, p in model.named_parameters()}
    convert(model, config())
    assert {name: id(p) for name, p in model.named_parameters()} == names


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"scope": ["mlp.gate"]}, r"quant.scope=mlp.gate: matches no linear of toy; did you mean 'mlp.gate_proj'"),
        ({"bf16_also": [4, 2]}, r"quant.bf16_also=\[2, 4\]: must name some of the blocks 3 to 5"),
        ({"bf16_also": [3, 4, 5]}, r"quant.bf16_also=\[3, 4, 5\]: .*, and not all of them"),
        ({"bf16_blocks": 8}, r"quant.bf16_blocks=8: toy has 8 blocks; the largest valid value is 7"),
    ],
)
def test_refusals(quant, message):
    with pytest.raises(ConfigError, match=message):
        convert(Model(), config(**quant))
