"""The compiled step: one graph, no break, no host synchronization, and the eager step's numbers."""

from __future__ import annotations

import functools

import pytest
import torch

from qat.cli import preflight
from qat.errors import UserError
from qat.models.load import load_model
from qat.quant.convert import convert
from qat.quant.kernels import dispatch, lookup
from qat.train.step import Trainer


# One arithmetic a test: tracing takes long. VARIANTS has one in the other.
@pytest.fixture
def fp32(monkeypatch):
    monkeypatch.setenv("HIF8_ARITHMETIC", "fp32")


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setenv("HIF8_ARITHMETIC", "bf16")


def tokens(cfg, seed: int) -> torch.Tensor:
    shape = cfg.budget.micro_batch, 33
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(seed))


def trained(cfg, steps: int) -> tuple[list[float], Trainer]:
    torch._dynamo.reset()  # it compiles the same code for at most eight configurations
    model, _ = load_model(cfg.model, cfg.seed)
    trainer = Trainer(model, convert(model, cfg)[0], cfg)
    return [trainer.step(number, [tokens(cfg, number)]).loss.item() for number in range(1, steps + 1)], trainer


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a C++ compiler: the same graphs, run by PyTorch; the number of graphs is counted."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield graphs
    torch._dynamo.reset()


SMALL = ("model.blocks=1", "model.architecture.num_hidden_layers=1", "quant.bf16_blocks=0")  # tracing takes long
BOTH = ("model.blocks=2", "model.architecture.num_hidden_layers=2", "quant.bf16_blocks=1")  # one quantized, one not
VARIANTS = {
    "max": ("experiment=exp8", *BOTH),
    "all linears": ("experiment=exp8", "quant.scope=[mlp.*,self_attn.*]", "quant.rounding=hybrid"),
    "current": ("experiment=exp8", "scaling=current"),
    "masked, CAGE": ("experiment=exp8", "estimator=cage", "quant.cage_silent=0.1", "quant.ste=masked"),
    "learned": ("experiment=exp8", "scaling=lsq"),
    "descaled, by call": ("experiment=exp8", "quant.operands=descaled", "scaling.tick=call"),
    "fp8_e4m3, logits at once": ("experiment=exp8", "quant=fp8_e4m3", "budget.largest_logits=65536"),
    "BF16 warmup": ("experiment=exp8", "warmup.bf16=0.5", "scaling.discard_after_warmup=false"),
    "fp8 products": ("experiment=exp8", "quant.gemm=fp8"),
    "BF16 arithmetic": ("experiment=exp8", "budget.arithmetic=bf16"),
    "distilled, in pieces": ("experiment=exp8", "loss.distill=0.5", "budget.largest_logits=65536"),
    "activation checkpointing": ("experiment=exp8", "budget.activation_checkpointing=true"),
    "bf16": ("quant=bf16",),
}


def configured(config, variant: str):
    """(configuration, how many steps show all that is compiled of it)."""
    cfg = config(*SMALL, *VARIANTS[variant], **{"optim.lr": 1e-3})
    cfg.budget.micro_batch = 12 if cfg.budget.largest_logits == 65536 else 2
    if variant == "BF16 warmup":
        return cfg, 9
    cfg.warmup.bf16 = 0.0
    return cfg, 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph_gives_the_eager_numbers(config, fp32, traced, variant):
    cfg, steps = configured(config, variant)
    eager, plain = trained(cfg, steps)
    assert not traced
    cfg.budget.compile = True
    compiled, trainer = trained(cfg, steps)
    assert compiled == pytest.approx(eager, rel=1e-5)
    # One graph for BF16 and one for quantized steps; the first quantized one, without a history, is not worth one.
    assert len(traced) == (2 if variant == "BF16 warmup" else 1)
    if variant.endswith("at once"):  # an eager step computes them in pieces
        assert sum("cross_entropy" in str(node.target) for node in traced[0].graph.nodes) == 1
    if trainer.bank is not None:
        torch.testing.assert_close(trainer.bank.state_dict(), plain.bank.state_dict(), rtol=1e-4, atol=1e-7)
        assert trainer.bank.history.any(0).all()


@pytest.mark.parametrize(
    "variant", ["all linears", "current", "masked, CAGE", "fp8 products", "activation checkpointing"]
)
def test_looking_up_in_the_graph_gives_the_eager_numbers(config, bf16, traced, monkeypatch, variant):
    """Steps compiled for a GPU, here run on the CPU: rounding is part of the graph, and each amax has its own entry."""
    monkeypatch.setattr(
        "qat.quant.kernels.dispatch.table", lambda device, _, *edges: lookup.table(device, *dispatch._edges(*edges))
    )
    cfg, steps = configured(config, variant)
    eager, plain = trained(cfg, steps)
    cfg.budget.compile = True
    compiled, trainer = trained(cfg, steps)
    assert len(traced) == 1
    called = {str(node.target) for node in traced[0].graph.nodes}
    assert not any("hif8.quantize" in name for name in called)
    assert compiled == pytest.approx(eager, rel=1e-5)
    torch.testing.assert_close(trainer.bank.state_dict(), plain.bank.state_dict(), rtol=1e-4, atol=1e-7)
    assert trainer.bank.history.any(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("descaled, by call", "BF16 warmup")])
def test_a_step_never_waits_for_the_gpu(config, variant, compile):
    cfg, _ = configured(config, variant)
    cfg.budget.compile = compile
    _, trainer = trained(cfg, 3)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [trainer.step(number, [tokens(cfg, number)]) for number in range(4, 7)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(result.finite and result.loss.isfinite() for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_inductor_gives_the_eager_numbers(config, variant):
    cfg, steps = configured(config, variant)
    eager, _ = trained(cfg, steps)
    cfg.budget.compile = True
    compiled, _ = trained(cfg, steps)
    assert compiled == pytest.approx(eager, rel=2e-3)  # BF16 products, summed in another order


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_inductor_leaves_no_gradient_where_the_teacher_is_the_model(config, arithmetic, monkeypatch):
    """Its logits are then those of the model to the bit, though only the model's graph has a backward pass."""
    monkeypatch.setenv("HIF8_ARITHMETIC", arithmetic)
    cfg = config(*SMALL, "quant=bf16", "loss=distill", "budget.compile=true")
    try:
        preflight._compilers(cfg)
    except UserError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    model, _ = load_model(cfg.model, cfg.seed)
    result = Trainer(model, None, cfg).step(1, [tokens(cfg, 1), tokens(cfg, 2)])
    assert result.objective == 0 and result.grad_norm == 0 and result.loss > 1


def test_nothing_in_a_cpu_step_reads_a_tensor_but_the_kernels(config, monkeypatch):
    """Find what would wait on a GPU, as far as Python shows it: `.item()`, `.tolist()`, a tensor as a condition. Fused
    CPU kernels may read."""
    cfg = config("experiment=exp8", "estimator=cage", **{"warmup.bf16": 0.0, "quant.cage_silent": 0.1})
    _, trainer = trained(cfg, 2)
    monkeypatch.setattr("qat.quant.kernels.dispatch._fused", lambda *_: None)
    monkeypatch.setattr("qat.quant.matmul.dispatch.mm", lambda a, b, factor: (a @ b) * factor)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):

        def read(self, *_, name=name):
            raise AssertionError(f"a step called {name} on a tensor")

        monkeypatch.setattr(torch.Tensor, name, read)
    result = trainer.step(3, [tokens(cfg, 3)])
    monkeypatch.undo()
    assert result.finite
