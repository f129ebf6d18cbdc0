"""What composes and validates, what an experiment, a protocol and a budget change, and how a mistake is answered."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from qat.cli import entry, experiments
from qat.cli.validate import validate
from qat.config import Config
from qat.errors import UserError
from qat.quant.convert import convert
from tests.cli.bad_input.mistakes import A_NAME
from tests.conftest import ROOT, composed, composing, options

EXPERIMENTS, PROTOCOLS, BUDGETS = options("experiment"), options("protocol"), options("budget")


def under(protocol: str, experiment: str) -> tuple[str, ...]:
    """The words of an experiment under a protocol; paper is the default."""
    return (f"experiment={experiment}", *([f"protocol={protocol}"] if protocol != "paper" else []))


def flat(cfg: Config) -> dict:
    def walk(tree: dict, prefix: str = ""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(dataclasses.asdict(cfg)))


def changes(words: tuple[str, ...], base: tuple[str, ...] = ()) -> dict:
    """{dotted key: its new value} of all that differs between two command lines."""
    ours, theirs = (flat(entry.typed_config(composed(*each))) for each in (words, base))
    assert {key for key in ours.keys() ^ theirs.keys() if not key.startswith("benchmark.tasks.")} == set()
    return {key: value for key, value in ours.items() if value != theirs.get(key)}


@pytest.mark.parametrize("name", ["train", "suite"])
def test_an_unsound_configuration_is_refused_before_torch_is_imported(tmp_path, name):
    """Importing PyTorch takes seconds. A fresh interpreter, which prints one line and writes nothing."""
    code = f"""
import runpy, sys
sys.argv = ["{ROOT}/scripts/{name}.py", "experiment=exp8", "scaling.algo=maxx"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, [name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert list(tmp_path.iterdir()) == [] and done.stdout == "2 []\n"
    assert done.stderr == "error: scaling.algo=maxx: unknown value; did you mean 'max'?\n"


# ---------------------------------------------------------------------------------------------------- composition


def test_every_option_of_every_group_composes_and_validates():
    # The first is chosen by protocol and experiment; the others have tests of their own.
    skipped = ("specialization", "experiment", "hydra")
    groups = {p.name: options(p.name) for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name not in skipped}
    assert len(groups) == 15 and all(groups.values())
    for number in range(max(map(len, groups.values()))):
        words = [f"{group}={names[number % len(names)]}" for group, names in groups.items()]
        words += ["model.path=Somebody/hub"] if "model=hub" in words else []  # its last part is the name
        words += ["data.label_shift=once"] if "loss=distill" in words else []
        words += ["scaling.update_every=1", "quant.overflow=clip"] if "scaling=lsq" in words else []
        words += ["quant.overflow=clip"] if "estimator=masked" in words else []
        cfg = entry.typed_config(composed(*words))
        named = {"model": cfg.model.name, "data": cfg.data.name, "budget": cfg.budget.name}
        named |= {"benchmark": cfg.benchmark.name, "logger": cfg.logger.name, "protocol": cfg.protocol}
        assert [f"{group}={name}" for group, name in named.items() if f"{group}={name}" not in words] == []


def test_every_experiment_composes_with_every_protocol_and_budget():
    """Budgets are composed with protocols; their sizes alone meet each experiment, whose batch is a part of them."""
    sizes = {budget: changes((f"budget={budget}",)) for budget in BUDGETS}
    for protocol, budget in itertools.product(PROTOCOLS, BUDGETS):
        cfg = entry.typed_config(composed(*under(protocol, "exp8"), f"budget={budget}"))
        assert (cfg.protocol, cfg.budget.name, cfg.optim.lr) == (protocol, budget, 1e-5)
    for experiment, protocol in itertools.product(EXPERIMENTS, PROTOCOLS):
        cfg = entry.typed_config(composed(*under(protocol, experiment)))
        assert cfg.protocol == protocol
        for budget in BUDGETS:
            for key, value in sizes[budget].items():
                if key.startswith("budget."):
                    setattr(cfg.budget, key.removeprefix("budget."), value)
            validate(cfg)
            assert budget == "laptop" or cfg.budget.name == budget
            assert cfg.steps >= 6


def test_a_budget_changes_nothing_but_sizes():
    sizes = {"name", "steps", "micro_batch", "accumulation", "seq_len", "compile"}
    sizes |= {"checkpoint_every", "telemetry_every", "heldout_tokens", "validation_tokens"}
    for budget in BUDGETS:
        keys = changes((f"budget={budget}",)).keys()
        allowed = {f"budget.{size}" for size in sizes}
        assert {key for key in keys if not key.startswith(("benchmark.", "data.", "model."))} <= allowed
    paper = entry.typed_config(composed("budget=paper"))
    assert (paper.steps, paper.batch, paper.budget.seq_len) == (10_000, (16, 64), 1024)
    assert (paper.benchmark.name, entry.typed_config(composed("budget=smoke")).benchmark.name) == ("paper", "smoke")
    assert (paper.model.name, paper.data.path, paper.data.subset) == (
        "openpangu_1b", "HuggingFaceFW/fineweb", "sample-10BT",
    )  # fmt: skip
    assert entry.typed_config(composed("budget=paper", "model=tiny")).model.name == "tiny"
    assert entry.typed_config(composed("budget=paper", "experiment=exp7")).bf16_warmup_steps == 500
    assert entry.typed_config(composed("budget=paper")).lr_warmup_steps == 300


def test_large_budgets_bring_their_own_text_and_the_command_line_outdoes_it():
    texts = {budget: composed(f"budget={budget}").data.name for budget in BUDGETS}
    assert texts == dict.fromkeys(BUDGETS, "embedded") | {"gpu": "manuals", "paper": "fineweb"}
    for data, protocol in itertools.product(("fineweb", "embedded"), PROTOCOLS):
        words = (f"data={data}", "budget=gpu", f"protocol={protocol}", "experiment=exp8")
        for ordered in (words, words[::-1]):
            cfg = entry.typed_config(composed(*ordered))
            assert (cfg.data.name, cfg.budget.name) == (data, "gpu")
    assert composed("budget=gpu", "protocol=released").data.label_shift == "twice"


# ----------------------------------------------------------------------------------------- experiments, protocols

WINDOW_30 = {"scaling.window": 30}
MAX_AND_WARMUP = {"warmup.bf16": 0.05}  # max and w64 are the defaults
PAPER = {
    "exp1": {"quant.format": "none"},
    "exp2": WINDOW_30 | {"scaling.algo": "most_recent", "budget.steps_factor": 0.5, "budget.batch_factor": 0.25},
    "exp3": WINDOW_30 | {"scaling.algo": "most_recent"},
    "exp4": WINDOW_30 | {"scaling.algo": "exp_smooth"},
    "exp5": {"scaling.algo": "current"},
    "exp6": {"scaling.algo": "exp_smooth", "scaling.window": 256},
    "exp7": MAX_AND_WARMUP,
    "exp8": MAX_AND_WARMUP | {"optim.lr": 1e-5},
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_changes_only_what_it_names(experiment):
    assert changes(under("paper", experiment)) == {"experiment": experiment} | PAPER[experiment]


RELEASED = {
    "protocol": "released",
    "data.label_shift": "twice",  # row 1 of paper.md, section 4
    "quant.overflow": "inf",  # row 2
    "quant.operands": "descaled",
    "scaling.tick": "call",  # row 3
    "scaling.sync": "none",
    "scaling.observe_in_warmup": False,  # row 4
    "optim.master_weights": False,  # row 9
    "optim.lr_from_zero": True,  # row 14
    "data.duplicate_workers": 2,  # row 10
}
HELD = {"scaling.settle": 0.1, "scaling.update_every": 10}  # row 5
WIDER = {"quant.scope": ["mlp.*", "self_attn.*"]}  # row 6
WIDEST = WIDER | {"quant.bf16_blocks": 0}
SPECIAL = {
    "exp1": {},
    "exp2": WIDEST,
    "exp3": WIDEST | HELD,
    "exp4": WIDEST | HELD,
    "exp5": WIDEST,
    "exp6": WIDER | HELD | {"scaling.window": 30},
    "exp7": {},
    "exp8": {},
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_released_protocol_is_the_papers_section_4(experiment):
    words = [under(protocol, experiment) for protocol in ("released", "paper")]
    assert changes(*words) == RELEASED | SPECIAL[experiment]


VENDOR = WIDEST | {
    "protocol": "vendor",
    "quant.target_gradient": 224.0,
    "quant.overflow": "saturate",
    "scaling.update_every": 10,
    "scaling.guard": 1.0,
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_vendors_protocol_changes_every_experiment_alike(experiment):
    assert changes(*(under(protocol, experiment) for protocol in ("vendor", "paper"))) == VENDOR


def test_a_key_of_the_released_protocol_can_be_set_alone():
    words = under("released", "exp3")
    single = {"data.label_shift": "once", "scaling.update_every": 1}
    assert changes((*words, *(f"{key}={value}" for key, value in single.items())), words) == single


LINEARS = {"exp2": 182, "exp3": 182, "exp4": 182, "exp5": 182, "exp6": 147, "exp7": 63, "exp8": 63}


def test_the_number_of_quantized_linears_is_the_papers():
    """On openPangu's 26 blocks: 63 linears in the text, and what the released code quantized instead (row 6)."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=26, **sizes))
    originals = dict(model.named_modules())
    for protocol, experiment in itertools.product(PROTOCOLS, LINEARS):
        cfg = entry.typed_config(composed(*under(protocol, experiment)))
        bank, coverage = convert(model, cfg)
        expected = {"paper": 63, "released": LINEARS[experiment], "vendor": 182}
        assert len(coverage.linears) == expected[protocol]
        assert sum(name.endswith("/weight") for name in bank.names) == len(coverage.linears)
        for name in coverage.linears:
            model.set_submodule(name, originals[name])


def test_an_experiments_own_sweep_is_expanded():
    whole = entry.typed_config(composed())
    with composing():

        def configs(*arguments) -> list[Config]:
            return [job.cfg for job in experiments.jobs_of(*arguments)]

        rates = configs("exp1", ["experiment=exp8", "seed=3", "report.out=elsewhere"])
        scalings = configs("exp2", [])
        chosen = configs("exp2", ["scaling=max"])
        same = [*configs("exp1", ["optim.lr=3e-5"]), *configs("exp2", ["scaling.algo=max"])]
        seeded = configs("exp2", ["seed=7", "scaling=max"], [0, 1])
    assert [(cell.optim.lr, cell.seed, cell.quantized) for cell in rates] == [(2e-3, 3, False), (1e-4, 3, False)]
    assert [cell.scaling.algo for cell in scalings] == ["current", "most_recent"]
    assert [cell.scaling.algo for cell in chosen] == ["max"]
    assert [(cell.experiment, cell.optim.lr, cell.scaling.algo) for cell in same] == [
        ("exp1", 3e-5, "max"),
        ("exp2", 1e-4, "max"),
    ]
    assert [(cell.scaling.algo, cell.seed) for cell in seeded] == [("max", 0), ("max", 1)]
    assert [cell.steps for cell in scalings] == [whole.steps / 2] * 2
    assert [math.prod(cell.batch) for cell in scalings] == [math.prod(whole.batch) / 4] * 2


def test_an_experiments_own_sweep_is_read_as_hydra_reads_it(tmp_path):
    """Commas also stand in lists, and a range or one value may be swept."""
    axes = {"quant.scope": "[mlp.*],[mlp.*,self_attn.*]", "seed": "range(0,3)", "optim.lr": "1e-4"}
    lines = "".join(f"      {key}: '{values}'\n" for key, values in axes.items())
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n{lines}"
    )
    with composing():
        jobs = experiments.jobs_of("mine", [f"hydra.searchpath=[{tmp_path}]"])
    scopes = [["mlp.*"], ["mlp.*", "self_attn.*"]]
    assert [(job.cfg.quant.scope, job.cfg.seed) for job in jobs] == [(s, n) for s in scopes for n in range(3)]


# --------------------------------------------------------------------------------------------------------- mistakes
# Most are in tests/cli/bad_input/.

# Found in the composed configuration, which spares composing one for each: (words, what the line must hold).
VALUES = [
    ("repeat=-1", "repeat=-1: must lie in [0, 1000]; the nearest valid value is 0"),
    ("seed=9999999999", "the nearest valid value is 2147483647"),
    ("budget.steps=99999999999", "must lie in [1, 2147483647]; the nearest valid value is 2147483647"),
    ("budget.micro_batch=99999999999", "must lie in [1, 65536]; the nearest valid value is 65536"),
    ("budget.accumulation=99999999999", "must lie in [1, 1048576]; the nearest valid value is 1048576"),
    ("budget.heldout_tokens=99999999999999999999", "must lie in [1, 2147483647]; the nearest valid value is"),
    ("repeat=99999999999", "must lie in [0, 1000]; the nearest valid value is 1000"),
    ("ptq.sequences=99999999999", "must lie in [1, 65536]; the nearest valid value is 65536"),
    ("optim.lr=nan", "optim.lr=nan: must lie in [1e-12, 10]"),
    ("scaling.alpha=1.5", "scaling.alpha=1.5: must lie in [0, 1]; the nearest valid value is 1"),
    ("scaling.window=0", "scaling.window=0: must lie in [1, 65536]; the nearest valid value is 1"),
    ("budget.seq_len=3", "budget.seq_len=3: must lie in [4, 1048576]; the nearest valid value is 4"),
    ("quant.overflow=clamp", "quant.overflow=clamp: unknown value; did you mean 'clip'?"),
    ("validation.source=web", "validation.source=web: unknown value; choose one of package, hub, files"),
    ("validation.path=null", "validation.source=package needs a path, as in validation=wikipedia"),
    ("validation.name=embedded", "validation.name=embedded: is the text trained on, not one of another kind; give it"),
    ("data.label_shift=thrice", "data.label_shift=thrice: unknown value; did you mean 'twice'?"),
    ("logger.mode=dryrun", "logger.mode=dryrun: unknown value; choose one of offline, online, disabled"),
    ("benchmark.split=tset", "benchmark.split=tset: unknown value; did you mean 'test'?"),
    ("benchmark.tasks.hellaswag.limit=0", "benchmark.tasks.hellaswag.limit=0: the nearest valid value is 1"),
    ("benchmark.tasks.hellaswag.shots=-1", "benchmark.tasks.hellaswag.shots=-1: the nearest valid value is 0"),
    ("quant.scope=[]", "quant.scope=[]: nothing would be quantized; name linears as in [mlp.down_proj]"),
    ("quant.weights=false quant.activations=false quant.gradients=false", "quant.weights=false: activations and"),
    ("quant.format=fp8_e4m3 quant.target_weight=449", "above the largest fp8_e4m3 value; the nearest valid value is 4"),
    ("quant.rounding=hybrid quant.gradients=false", "rounds gradients, and quant.gradients=false; set quant.rounding"),
    ("quant.rounding=hybrid quant.format=fp8_e4m3", "fp8_e4m3 has no hybrid rounding; set quant.rounding=nearest"),
    ("optim.pure_bf16=true", "leaves no FP32 master weights; set optim.master_weights=false"),
    ("scaling.guard=-1", "scaling.guard=-1.0: must lie in [0, 15]; the nearest valid value is 0"),
    ("quant.gemm=fp8 quant.overflow=inf", "quant.overflow=inf lets values through that E4M3 cannot hold; set"),
    ("quant.gemm=fp8 quant.format=fp8_e4m3", "quant.gemm=fp8: with quant.format=fp8_e4m3 there is no exact E4M3"),
    ("quant.gemm=fp8 quant.operands=descaled", "with quant.operands=descaled there is no exact E4M3 form; set"),
    ("quant.gemm=fp8 quant.weights=false", "a role that is not quantized has no 8-bit operands; set quant.gemm"),
    ("quant.gemm=fp8 quant.target_gradient=224", "quant.target_gradient=224: quant.gemm=fp8 holds values up to"),
    ("quant.gemm=fp8 budget.micro_batch=1 budget.seq_len=100", "budget.seq_len=100: quant.gemm=fp8 takes"),
    ("loss.distill=0.5 data.label_shift=twice", "predicts the next token, data.label_shift=twice trains the one after"),
    ("optim.moments=hif8 budget.parallel=fsdp", "optim.moments=hif8: a moment has one scale, and budget.parallel=fsdp"),
    (
        "optim.moments=bf16 optim.pure_bf16=true optim.master_weights=false budget.arithmetic=bf16",
        "optim.moments=bf16: optim.pure_bf16=true has them in BF16; leave it out",
    ),
    ("scaling.algo=lsq scaling.update_every=2", "scaling=lsq learns every step; set scaling.update_every=1"),
    ("optim.pure_bf16=true optim.master_weights=false", "trains and scores in BF16; set budget.arithmetic=bf16"),
    ("quant.cage=10 optim.master_weights=false", "less than BF16 can hold; set optim.master_weights=true"),
    ("quant.rounding=hybrid quant.target_gradient=224", "rounds values past the clip again; set quant.overflow=satur"),
    ("quant.bf16_also=[2,1]", "name blocks once and in order: [1, 2]"),
    ("scaling.algo=lsq quant.overflow=inf", "quant.overflow=inf: scaling=lsq learns where to clip; set"),
    ("scaling.algo=lsq quant.weights=false quant.activations=false", "scaling=lsq: learns no scale of gradients"),
    ("loss.distill=2", "loss.distill=2.0: must lie in [0, 1]; the nearest valid value is 1"),
    ("quant.cage_silent=0.5", "quant.cage_silent=0.5: has no effect without CAGE; set estimator=cage"),
    ("quant.cage=10 quant.weights=false", "weights are not rounded (quant.weights=false); set quant.cage=0"),
    ("quant.cage=10 quant.cage_silent=1", "silent in all 16 steps; the largest valid share is 0.9375"),
    ("scaling.algo=exp_smooth scaling.window=1", "exp_smooth averages two entries; the smallest valid value is 2"),
    ("budget.steps=30 warmup.bf16=1", "would start at step 31 of 30; the largest valid share is 0.9667"),
    ("budget.steps=30 optim.lr_warmup=1", "learning rate would never leave its warmup; the largest valid share is 0.9"),
    ("scaling.lr=0.2", "scaling.lr=0.2: has no effect with scaling=max; set scaling=lsq"),
    ("scaling.alpha=0.9", "scaling.alpha=0.9: has no effect with scaling=max; set scaling=exp_smooth"),
    ("quant.ste=masked quant.overflow=inf", "quant.ste=masked: stops the gradients of what is clipped, and quant.over"),
    ("quant.ste=masked quant.weights=false quant.activations=false", "no weight or input of a linear is rounded; set"),
    ("optim.lr_from_zero=true optim.lr_warmup=0", "optim.lr_warmup=0 has no first step; set optim.lr_from_zero=false"),
    ("scaling.shadow=[current/10]", "scaling.shadow=current/10: current scales by the amax itself, and holds none"),
    ("replay.rules=[]", "replay.rules=[]: nothing to replay; name rules as in [most_recent,max:64]"),
    ("ptq.questions=[smoothquant]", "ptq.questions=smoothquant: is no row of ptq.rungs; did you mean 'smoothquant:0."),
    ("sensitivity.task=hellaswag sensitivity.questions=0", "sensitivity.task=hellaswag: no question is asked with"),
    ("sensitivity.task=lambada", "sensitivity.task=lambada: unknown value; choose one of mmlu, mmlu_continuation"),
    ("sensitivity.questions=9 sensitivity.groups=[linear]", "sensitivity.questions=9: no question is asked with"),
    ("seeds=[0,0]", "seeds=[0, 0]: must be different seeds from 0 up, as in [0,1,2]"),
    ("seeds=[0,-1]", "seeds=[0, -1]: must be different seeds from 0 up, as in [0,1,2]"),
    ("launch.launcher=local", "launch.launcher=local: unknown value; choose one of basic, slurm"),
    ("launch.nodes=2", "launch.nodes=2: is for launch.launcher=slurm; leave it out"),
    ("quant.format=hif9", "quant.format=hif9: unknown value; did you mean 'hif8'?"),
    ("quant.bf16_blocks=30", "smollm2_135m has 30 blocks, so nothing would be quantized; the largest valid value"),
    ("budget.batch_factor=0.25 budget.micro_batch=2 budget.accumulation=1", "times batch_factor=1/4 is no whole numbe"),
    ("model.source=random", "model.architecture=null: model.source=random needs sizes, as in model=tiny"),
    ("model.path=null", "model.path=null: model.source=package needs one, as in model.path=HuggingFaceTB/SmolLM2-135M"),
    ("model.revision=main", "model.revision=main: model.source=package has none; leave it out"),
    ("model.source=hub model.path=/ model.revision=main", "model.revision=main: a folder has none; leave it out"),
    ("data.source=hub data.path=/ data.revision=main", "data.revision=main: a folder has none; leave it out"),
    ("data.revision=main", "data.revision=main: data.source=package has none; leave it out"),
    ("data.subset=en", "data.subset=en: data.source=package has none; leave it out"),
    ("validation.label_shift=twice", "validation.label_shift=twice: has no effect on a text that is only measured"),
    ("model.name=../../x", f"model.name='../../x': {A_NAME}"),
    ("data.name=/etc/x", f"data.name='/etc/x': {A_NAME}"),
    ("benchmark.name=..", f"benchmark.name='..': {A_NAME}"),
    (f"benchmark.name={'x' * 300}", A_NAME),
    ("budget.name=.hidden", f"budget.name='.hidden': {A_NAME}"),
    ("logger.project=a/b?c", f"logger.project='a/b?c': {A_NAME}"),
    ("report.experiments=[../../x]", f"report.experiments='../../x': {A_NAME}"),
    ("data.path=null", "data.path=null: data.source=package needs a path, as in data=fineweb"),
    ("data.cache=true", "data.cache=true: data.source=package is not streamed; set data.cache=false"),
]


@pytest.mark.parametrize(("words", "wanted"), VALUES, ids=[words for words, _ in VALUES])
def test_a_bad_value_is_answered_in_one_line(words, wanted):
    cfg = OmegaConf.merge(composed(), OmegaConf.from_dotlist(words.split()))
    with pytest.raises(UserError) as caught:
        entry.typed_config(cfg)
    line = str(caught.value)
    assert wanted in line and "\n" not in line and len(line) < 250


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.3])
def test_the_batch_that_a_mistake_is_answered_with_is_valid(factor):
    cfg = entry.typed_config(composed())
    for micro, accumulation in itertools.product(range(1, 6), range(1, 7)):
        cfg.budget.batch_factor, cfg.budget.micro_batch, cfg.budget.accumulation = factor, micro, accumulation
        try:
            validate(cfg)
        except UserError as error:
            cfg.budget.accumulation = int(str(error).rpartition(" ")[2])
            assert cfg.budget.accumulation != accumulation
            validate(cfg)
        sequences = cfg.budget.micro_batch * cfg.budget.accumulation * factor
        assert cfg.batch[0] <= micro and cfg.batch[0] * cfg.batch[1] == pytest.approx(sequences)


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3, 0.123456])
def test_the_nearest_accumulation_is_found_at_once(factor):
    """It is the one that trying all of them finds, and absurd numbers do not keep it waiting."""
    cfg = entry.typed_config(composed())
    cfg.budget.batch_factor = factor
    for micro, wanted, ranks in itertools.product((1, 2, 6), (1, 4, 7, 50), (1, 2, 3)):
        cfg.budget.micro_batch, cfg.budget.accumulation = micro, wanted
        tried = range(1, wanted + ranks * cfg.batch_factor.denominator + 1) if factor > 0.2 else ()
        fitting = [n for n in tried if (calls := cfg.calls(n)) is not None and calls % ranks == 0]
        nearest = cfg.nearest_accumulation(ranks)
        assert cfg.calls(nearest) % ranks == 0
        assert not fitting or nearest == min(fitting, key=lambda n: (abs(n - wanted), -n))
    assert cfg.calls(cfg.nearest_accumulation(99_999_999_999)) % 99_999_999_999 == 0
