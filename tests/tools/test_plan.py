"""The plan: its memory against what autograd keeps and a record measured, its arithmetic, and a page for everything."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from qat.cli.preflight import checkpoint_bytes
from qat.config import BenchmarkConfig, Config, TaskConfig
from qat.eval import evaluate, questions
from qat.models.load import load_config, load_model
from qat.models.tokenizer import byte_tokenizer
from qat.quant.convert import convert
from qat.runs.folder import Run
from qat.tools import flops
from qat.tools.bench import steps, timing
from qat.tools.plan import costs, memory, plan
from qat.tools.plan.machine import Machine
from qat.tools.plan.page import missing, page
from qat.train.loop import train
from qat.train.step import Trainer
from tests.conftest import ROOT, TINY, composed, options, typed

CPU = Machine(
    processor="Some CPU", cores=2, memory=8 * 10**9, gpu=None, gpus=0, gpu_memory=0, flops=1e11, runs_free=10**11,
    cache_free=10**11, one_disk=True, problems=[], hub=False,
)  # fmt: skip
GPUS = dataclasses.replace(CPU, gpu="NVIDIA H200", gpus=8, gpu_memory=141 * 10**9, flops=7e14, hub=True)
PANGU = ("model=openpangu_1b", "data=fineweb", "budget=paper", "experiment=exp8", "budget.arithmetic=bf16")
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
ALL = ["mlp.*", "self_attn.*"]
EXPERIMENTS, PROTOCOLS = options("experiment"), ("paper", "released")  # vendor's scope is released's of exp2


@pytest.fixture
def untraced(monkeypatch):
    """Tracing takes seconds; most tests are about something else. What it gives for the paper's BF16 baseline."""
    monkeypatch.setattr(memory, "_peak", lambda *_: (4 * 1_155_912_192, 48_600_000_000))


# ---------------------------------------------------------------------------------------------------------- memory


def planned(cfg: Config, ranks: int = 1, on_gpus: bool = False) -> dict[str, float]:
    architecture = load_config(cfg.model)
    return memory.training(architecture, flops.model_shape(architecture, cfg)[0], cfg, ranks, on_gpus)


@pytest.mark.parametrize(
    ("arithmetic", "scope", "words"),
    [
        *((arithmetic, None, ["quant=bf16"]) for arithmetic in ("fp32", "bf16")),
        *((arithmetic, scope, []) for arithmetic in ("fp32", "bf16") for scope in (["mlp.*"], ALL)),
        ("fp32", ALL, ["scaling=lsq"]),
        ("fp32", ALL, ["loss=distill", "optim.moments=hif8"]),
        ("bf16", ALL, ["optim.pure_bf16=true", "optim.master_weights=false", "budget.arithmetic=bf16"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_step_without_data_allocates_what_a_real_one_does(arithmetic, scope, words, config):
    sizes = {"budget.micro_batch": 4, "budget.accumulation": 1, "budget.arithmetic": arithmetic}
    cfg = config(*words, **sizes, **{"model.architecture": SMALL})
    cfg.quant.scope, cfg.quant.bf16_blocks = scope or [], 2
    model, _ = load_model(cfg.model, seed=0)
    trainer = Trainer(model, convert(model, cfg)[0], cfg)
    batches = [torch.randint(512, (4, 33))]
    for number in range(1, cfg.steps):
        trainer.step(number, batches)
    with memory.Allocations(lambda: 0) as allocations:
        trainer.step(cfg.steps, batches)
    parts = planned(cfg)
    kind = "BF16" if cfg.optim.pure_bf16 else "FP32"
    passes = parts["activations and logits"] + parts.get(f"gradients, {kind}", 0)
    assert passes == pytest.approx(allocations.peak, rel=0.02)
    parameters, states = list(model.parameters()), trainer.optimizer.state.values()
    assert sum(p.nbytes for p in parameters) == parts[f"parameters, {kind}"]
    moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert moments == next(size for part, size in parts.items() if part.startswith("Adam moments"))


@pytest.mark.parametrize(("step", "scope", "keep"), [("bf16", None, 0), ("all", ALL, 0)])
def test_memory_is_within_its_stated_error_of_the_peak_that_a_record_measured(step, scope, keep, tmp_path):
    record = json.loads((ROOT / "experiments/records/2026-11-23_bench_cpu/bench.json").read_text())
    assert (record["facts"]["batch"], record["facts"]["arithmetic"]) == ("4 x 256 tokens", "fp32")
    row = "peak memory: all : bf16"
    note = next(each["note"] for each in record["rows"] if each["what"] == row)  # 4.86 : 4.57 GiB
    gigabytes = dict(zip((step, "bf16"), map(float, re.findall(r"[\d.]+", note)), strict=True))
    process = 0.45  # GiB, of Python, PyTorch and transformers themselves
    measured = (gigabytes[step] - process) * 2**30
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    cfg = typed(tmp_path, *TINY, "quant=bf16" if scope is None else "quant=hif8", **{"model.architecture": sizes})
    cfg.budget.micro_batch, cfg.budget.accumulation, cfg.budget.seq_len, cfg.budget.arithmetic = 4, 1, 256, "fp32"
    cfg.quant.scope, cfg.quant.bf16_blocks = scope or [], keep
    assert sum(planned(cfg).values()) == pytest.approx(measured, rel=memory.ERROR)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        ({"num_hidden_layers": 8, "vocab_size": 8192}, (4, 1, 256)),
        ({"num_hidden_layers": 4, "vocab_size": 32768, "tie_word_embeddings": False}, (4, 2, 256)),
        ({"num_hidden_layers": 6, "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 3072}, (8, 1, 128)),
    ],
    ids=["deep", "untied", "wide"],
)
def test_memory_is_within_its_stated_error_of_the_peak_measured_here(sizes, batch, config):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4} | sizes
    cfg = config("experiment=exp8", **{"model.architecture": SMALL | sizes, "budget.arithmetic": "fp32"})
    cfg.quant.bf16_blocks, cfg.warmup.bf16 = 2, 0.0
    cfg.budget.micro_batch, cfg.budget.accumulation, cfg.budget.seq_len = batch
    process = timing.peak_memory(steps.one_model_alone, config("experiment=exp8"))  # of a few thousand parameters
    measured = timing.peak_memory(steps.one_model_alone, cfg) - process
    assert sum(planned(cfg).values()) == pytest.approx(measured, rel=memory.ERROR)


def test_activation_checkpointing_leaves_little_but_what_enters_each_block(config):
    cfg = config("experiment=exp8", **{"model.architecture": SMALL})
    plain = planned(cfg, on_gpus=True)
    cfg.budget.activation_checkpointing = True
    assert planned(cfg, on_gpus=True)["activations and logits"] < 0.6 * plain["activations and logits"]


def test_ranks_share_what_fsdp_shards_and_ddp_adds_buckets(config):
    cfg = config("experiment=exp8", **{"model.architecture": SMALL, "budget.accumulation": 16})
    alone, ddp = planned(cfg), planned(cfg, ranks=8)
    assert ddp == alone | {"gradient buckets": alone["parameters, FP32"]}
    cfg.budget.parallel = "fsdp"
    sharded = planned(cfg, ranks=8)
    for part in ("parameters, FP32", "gradients, FP32", "Adam moments, FP32"):
        assert sharded[part] == alone[part] / 8
    assert sharded["activations and logits"] == alone["activations and logits"]
    assert sharded["gathered for use"] > 0


def test_the_papers_run_fits_the_papers_gpus(tmp_path):
    cfg = typed(tmp_path, "experiment=exp8", "budget=paper", "model=openpangu_1b_random", "budget.arithmetic=bf16")
    cfg.quant.format = "none"  # as in the BF16 warmup, which takes more
    assert sum(planned(cfg, ranks=8, on_gpus=True).values()) <= (1 - memory.ERROR) * 80e9


@pytest.mark.usefixtures("untraced")
def test_a_teacher_takes_memory_and_time(tmp_path):
    words = (*PANGU, "budget.parallel=fsdp")
    plain, distilled = (
        plan.make(typed(tmp_path, *words, f"loss={loss}"), 8, CPU, on_gpus=True) for loss in ("ce", "distill")
    )
    before, after = (made.trainings[-1].memory for made in (plain, distilled))
    assert after.keys() - before.keys() == {"teacher, FP32"}
    assert after["teacher, FP32"] == 4 * plain.shape.parameters / 8
    assert distilled.trainings[0].hours(1e9, 8) == pytest.approx([h / 0.75 for h in plain.trainings[0].hours(1e9, 8)])
    assert "teacher, FP32" in page(distilled)


@pytest.mark.usefixtures("untraced")
def test_rules_tried_beside_the_own_take_another_gradient_and_passes(tmp_path):
    plain, shadow = (
        plan.make(typed(tmp_path, *PANGU, *words), 1, CPU, True)
        for words in ((), ("scaling.shadow=[most_recent,max:64,max:16]", "budget.telemetry_every=8"))
    )
    assert shadow.trainings[0].memory == plain.trainings[0].memory  # the baseline tries nothing
    more = {"gradients unquantized": 4 * plain.shape.parameters}
    assert shadow.trainings[1].memory == plain.trainings[1].memory | more
    assert [shadow.lengthened(training) for training in shadow.trainings] == [1, 1.6875]
    text = " ".join(page(shadow).split())
    assert "steps 1.69 times as long (scaling.shadow: every 8 steps 3 rules and a pass" in text


# --------------------------------------------------------------------------------------------------- sizes and costs


@pytest.mark.usefixtures("untraced")
def test_openpangu_is_known_where_no_hub_answers(tmp_path):
    made = plan.make(typed(tmp_path, *PANGU), 8, CPU, on_gpus=True)
    assert made.source.startswith("conf/model/openpangu_1b_random.yaml")
    assert made.shape.parameters == 1_155_912_192 and len(made.coverage.linears) == 63
    assert round(made.coverage.parameters / 1e6, 1) == 594.5
    # Without attention scores: six FLOPs for each of the 1,155.7 M weights of linears, the tied head's too.
    assert made.shape.flops(0) == 6 * made.coverage.matmul_parameters
    assert costs.tokens(made.cfg) == (1_048_576, 10_485_760_000)
    assert checkpoint_bytes(made.cfg, made.shape.parameters) == (3 * 12 * 1_155_912_192, 4 * 1_155_912_192)
    assert costs.cached_tokens(made.cfg, made.shape) == 4 * 10_485_760_000


def test_a_model_that_nobody_knows_leaves_a_page_without_its_sizes(tmp_path):
    made = plan.make(typed(tmp_path, *PANGU, "model=hub", "model.path=Somebody/Model"), 1, CPU, on_gpus=True)
    assert made.shape is None and made.unknown.startswith("model.path=Somebody/Model: cannot be loaded")
    text = page(made)
    assert "sizes unknown" in text and "27,632" in text and "10.5 billion tokens" in text
    assert "the model's config.json" in missing(made)


@pytest.mark.usefixtures("untraced")
def test_what_a_record_measured_on_this_machine_is_reckoned_with(tmp_path, monkeypatch):
    facts = {"model": "openpangu_1b_random", "hardware": "NVIDIA H200", "batch": "16 x 1024 tokens"}
    facts["arithmetic"] = "bf16"
    rows = [("bf16", "50,000 tokens/s, 40% of"), ("mlp", "40000 tokens/s"), ("all", "20000 tokens/s")]
    record = {"facts": facts, "rows": [{"what": f"step: {name} : bf16", "note": note} for name, note in rows]}
    (tmp_path / "2027-01-01_bench_gpu").mkdir()
    (tmp_path / "2027-01-01_bench_gpu/bench.json").write_text(json.dumps(record))
    monkeypatch.setattr(costs, "RECORDS", tmp_path)
    cfg = typed(tmp_path, *PANGU)
    baseline, run = plan.make(cfg, 8, GPUS, on_gpus=True).trainings
    assert [(rate.low, rate.high) for rate in baseline.rates + run.rates] == [(50_000, 50_000), (40_000, 40_000)]
    assert run.hours(8 * 40_000 * 3600, ranks=8) == (1.0, 1.0)
    other = plan.make(cfg, 8, CPU, on_gpus=True).trainings[0].rates
    assert "ASSUMED" in other[0].basis and other[0].low < 43e3 < other[0].high
    assert other[-1].basis == "measured on NVIDIA H200, 16 x 1024 tokens: 2027-01-01_bench_gpu"
    current = plan.make(typed(tmp_path, *PANGU, "scaling=current"), 8, GPUS, on_gpus=True).trainings[1].rates
    assert current[0].low < current[0].high  # no record of that
    cfg.budget.arithmetic = "fp32"
    assert not any("measured on" in rate.basis for rate in plan.make(cfg, 8, GPUS, on_gpus=True).trainings[0].rates)


def test_questions_of_the_quick_benchmark_are_those_that_its_file_counts():
    asked, tokens = costs.questions(composed("benchmark=quick"))
    assert asked == 404 and tokens == pytest.approx(26_300, rel=0.1)  # conf/benchmark/quick.yaml
    assert costs.questions(composed("benchmark=paper"))[0] == 14042 + 10042 + 2376 + 1172


@pytest.mark.parametrize("split", ["test", "validation"])
def test_all_questions_of_a_task_are_those_that_the_split_has(split):
    for task, subset in (("hellaswag", None), ("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
        documents, evaluated, _ = questions.splits(task, subset, split)
        one = BenchmarkConfig("one", split=split, tasks={task: TaskConfig()})
        assert costs.questions(Config(benchmark=one))[0] == len(documents[evaluated])
    mmlu = BenchmarkConfig("one", split=split, tasks={"mmlu": TaskConfig()})
    assert costs.questions(Config(benchmark=mmlu))[0] == {"test": 14042, "validation": 1531}[split]


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    "words", ["validation=wikipedia", "validation=none", "quant=bf16", "benchmark.control=true", "benchmark=passages"]
)
def test_held_out_text_is_counted_as_it_is_scored(words, config, monkeypatch):
    counted = []

    class Model:
        """Its decoder notes how many tokens pass through it."""

        config = LlamaConfig()

        def get_decoder(self):
            return self

        def __call__(self, input_ids, **_):
            counted.append(input_ids.numel())
            return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 257))

        def get_output_embeddings(self):
            return lambda states: states

    class Counting(evaluate._Scorer):
        def scored(self, _):
            return False

        def score(self, subject):
            built = self._build(subject)
            self._heldout(*built, beside=subject.cfg.quantized, taken={})
            if self._splits_gain(subject):
                self._under_ptq_scales(subject)

    monkeypatch.setattr(evaluate, "_Scorer", Counting)
    monkeypatch.setattr(evaluate.Subject, "build", lambda _: (Model(), byte_tokenizer()))
    monkeypatch.setattr(evaluate.Subject, "check", lambda _: None)
    monkeypatch.setattr(evaluate.Subject, "check_checkpoint", lambda _: None)
    cfg = config(words, **{"budget.heldout_tokens": 1024})
    evaluate.evaluate(cfg)
    planned = plan.make(cfg, 1, CPU, on_gpus=False)
    assert sum(counted) == planned.passes * costs.heldout(cfg)


@pytest.mark.usefixtures("untraced")
def test_a_finished_run_takes_the_disk_that_was_planned_and_no_more_time(config):
    cfg = config()
    before = plan.make(cfg, 1, CPU, on_gpus=False)
    run = train(cfg)
    planned = checkpoint_bytes(before.cfg, before.shape.parameters)[1]
    assert sum(f.stat().st_size for f in run.checkpoints.rglob("*.safetensors")) == pytest.approx(planned, rel=0.1)
    names = ("metrics.jsonl", "telemetry.jsonl", "amax.safetensors")
    rows = sum((run.path / name).stat().st_size for name in names)
    estimate = costs.rows(cfg, 3 * len(before.coverage.linears))
    assert estimate / 2 < rows < estimate * 2
    after = plan.make(cfg, 1, CPU, on_gpus=False)
    assert [training.done for training in after.trainings] == [0, cfg.steps]
    assert f"{cfg.steps} of {cfg.steps} steps done here" in page(after)


# ---------------------------------------------------------------------------------------------------------- the page


@pytest.mark.usefixtures("untraced")
def test_every_experiment_and_budget_has_a_page(tmp_path):
    cases = [(experiment, "laptop", protocol) for experiment in EXPERIMENTS for protocol in PROTOCOLS]
    for experiment, budget, protocol in (*cases, *itertools.product(["exp8"], options("budget"), PROTOCOLS)):
        cfg = typed(tmp_path, f"experiment={experiment}", f"budget={budget}", f"protocol={protocol}", "model=tiny")
        text = page(plan.make(cfg, 1, CPU, cfg.budget.compile))
        assert text.startswith(f"{experiment}: budget={budget} protocol={protocol} on ")
        assert all(len(line) <= 116 for line in text.splitlines()) and "\n\nmissing here: " in text
    assert not Run.of(cfg).path.exists()


@pytest.mark.usefixtures("untraced")
def test_the_page_of_the_paper_says_what_is_to_be_paid_and_what_is_missing(tmp_path, monkeypatch):
    made = plan.make(typed(tmp_path, *PANGU), 8, dataclasses.replace(CPU, problems=["no shots"]), True)
    assert "  together                         63     594.5 M   51.4%         51.4%" in page(made).splitlines()
    text = " ".join(page(made).split())
    for said in ("European Union is forbidden", "ODC-By", "GPU hours", "ASSUMED", "the paper's logs"):
        assert said in text
    assert "the paper's GPUs have 80 GB: it fits" in text  # 71.7 GB, with 10 % to spare
    assert "model.revision is not pinned" in text and "up to 27.6 GB" in text
    assert missing(made) == [
        "8 GPU(s): this machine has 0",
        "no shots",
        "a hub that answers: what is not cached cannot be downloaded",
    ]
    small = dataclasses.replace(GPUS, gpu_memory=48 * 10**9, runs_free=50 * 10**9, hub=True)
    lacking = missing(plan.make(made.cfg, 8, small, True))
    assert [line.split(":")[0] for line in lacking] == ["GPU memory", f"disk in {tmp_path} and for the token cache"]
    assert missing(plan.make(made.cfg, 8, GPUS, True)) == []
    monkeypatch.setattr(memory, "_peak", lambda *_: (4 * 1_155_912_192, 49_000_000_000))
    assert "the paper's GPUs have 80 GB: IT DOES NOT FIT" in " ".join(page(plan.make(made.cfg, 8, CPU, True)).split())


@pytest.mark.usefixtures("untraced")
def test_a_plan_says_what_a_rank_sends(tmp_path):
    cfg = typed(tmp_path, *PANGU)
    assert "sent by each rank       8.09 GB a step, in 181 calls" in page(plan.make(cfg, 8, CPU, on_gpus=True))
    assert "sent by each rank" not in page(plan.make(cfg, 1, CPU, on_gpus=False))


def test_the_script_prints_a_page_and_leaves_nothing(main, tmp_path):
    code, out, err = main("plan.py", *TINY, "experiment=exp8")
    assert (code, err) == (0, "") and out.startswith("exp8: budget=smoke")
    assert "missing here: " in out and not (tmp_path / "runs").exists()
