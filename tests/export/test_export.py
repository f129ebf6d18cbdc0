"""Export: codes that an independent implementation reads, and a folder that computes what W8A8 evaluation computed."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qat.analysis.compare import against_baseline
from qat.cli import runner
from qat.config import TaskConfig
from qat.errors import UserError
from qat.eval import arithmetic, benchmarks
from qat.eval.subject import Subject
from qat.export import export as exporting
from qat.export import hf_quantizer, model_card
from qat.export.export import export, load_export
from qat.export.hf_quantizer import HiF8Linear
from qat.models.load import load_model
from qat.models.tokenizer import byte_tokenizer
from qat.quant import hif8
from qat.quant.convert import convert, quantized_linears
from qat.quant.linear import round_weights
from qat.report.text import table
from qat.runs.folder import Run
from qat.train import checkpoint, loop
from qat.utils.environment import commit_name
from tests.conftest import RUNS, TINY

MAX = ("experiment=exp8", "benchmark.arithmetic=export")  # scored as an export computes
CURRENT = (*MAX, "scaling=current", "quant.scope=['*']")
SHORT = {"budget.steps": 3, "benchmark.tasks": {"arc_easy": TaskConfig(shots=0, limit=4)}}
FIRST = "model.layers.3.mlp.gate_proj"  # the first quantized linear of `MAX`


@pytest.fixture(scope="module")
def scored(configure, tmp_path_factory):
    """A run of max scaling on the MLPs that was trained and scored."""
    cfg = configure(tmp_path_factory.mktemp("runs"), *MAX, **SHORT)
    runner.train_with_baseline(cfg)
    runner.evaluate_and_compare(cfg)
    return cfg


@pytest.fixture(scope="module")
def folder(scored):
    return export(scored)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def evaluated(cfg) -> torch.nn.Module:
    return Subject(cfg, Run.of(cfg), "w8a8").build()[0]


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    tokens = torch.randint(0, 257, (3, 40), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens).logits


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal to the last bit, and worth comparing."""
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs) and bool(ours.isfinite().all()) and ours.std() > 0


# ------------------------------------------------------------------------------------------------------- the way back


def test_a_loaded_model_has_the_logits_of_the_evaluated_one(scored, folder):
    model, tokenizer = load_export(folder)
    assert not model.training and tokenizer("a b").input_ids == byte_tokenizer()("a b").input_ids
    assert same(logits(model), logits(evaluated(scored)))
    plain = Subject(scored, Run.of(scored), "bf16").build()[0]
    assert not torch.equal(logits(model), logits(plain))


def test_so_it_has_under_current_scaling_of_all_linears(scored, configure, tmp_path):
    cfg = configure(getattr(scored, RUNS), *CURRENT, **SHORT, **{"export.out": str(tmp_path / "elsewhere")})
    loop.train(cfg)
    model, _ = load_export(export(cfg))
    assert sum(isinstance(module, HiF8Linear) for module in model.modules()) == 3 * 7
    assert same(logits(model), logits(evaluated(cfg)))
    assert model.config.quantization_config.activation_scheme == "dynamic"
    assert not (Run.of(cfg).path / "export").exists()


def test_bf16_exports_round_more_than_training_and_its_evaluation(configure, tmp_path):
    """By default a BF16 run is scored with an FP32 residual stream and FP32 logits."""
    cfg = configure(tmp_path, "experiment=exp8", "budget.arithmetic=bf16", **SHORT)
    loop.train(cfg)
    model, _ = load_export(export(cfg))
    with arithmetic.autocast("training"):
        wanted = logits(evaluated(cfg))
    ours = logits(model)
    assert (ours.dtype, wanted.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(ours.float(), wanted)
    assert torch.cosine_similarity(ours.float().flatten(), wanted.flatten(), dim=0) > 0.99


def test_and_in_the_other_arithmetic(scored, folder):
    reference = evaluated(scored)
    other = "fp32" if scored.budget.arithmetic == "bf16" else "bf16"
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[other]
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(wanted)
    round_weights(quantized_linears(reference).values(), wanted)
    model, _ = load_export(folder, other)
    assert model.dtype is wanted and same(logits(model), logits(reference))


@pytest.mark.parametrize(
    "words",
    [
        "quant=fp8_e4m3",
        "quant=fp8_e5m2",
        "protocol=released",
        "quant.gemm=fp8",
        "quant.weights=false",
        "quant.activations=false",
        "quant.overflow=inf scaling=current scaling.guard=1",
    ],
)
def test_every_way_of_quantizing_survives(config, words):
    cfg = config("experiment=exp8", *words.split(), **{"model.architecture": BIASED})
    model, _ = load_model(cfg.model, seed=0)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16().float() + name.endswith("bias")
    bank, _ = convert(model, cfg)
    bank.scale.copy_(torch.linspace(1, 9, len(bank)))
    bank.unseen = frozenset()  # as after training
    bank.freeze()
    wanted = logits(model.eval())
    exporting._encode_linears(model, cfg, Run.of(cfg))
    assert sum(isinstance(module, HiF8Linear) for module in model.modules()) == 9
    assert same(logits(model.float()), wanted)


BIASED = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
BIASED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "mlp_bias": True, "tie_word_embeddings": False}


def test_lm_eval_answers_as_in_the_run_s_own_evaluation(scored, folder):
    model, tokenizer = load_export(folder)
    scores = benchmarks.score(model, tokenizer, scored.benchmark, 2048)
    assert scores.samples["arc_easy"] == Run.of(scored).samples("smoke", "w8a8", "arc_easy")
    assert len(scores.samples["arc_easy"]) == 4
    assert scores.samples["arc_easy"] != Run.of(scored).samples("smoke", "bf16", "arc_easy")


def test_transformers_reads_it_and_writes_it_again(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    shutil.copy(folder / "tokenizer.json", tmp_path / "again")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "again")
    assert same(logits(load_export(tmp_path / "again", "fp32")[0]), logits(model))
    scales = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("_scale")}
    moved = dict(model.to(torch.bfloat16).named_buffers())
    assert len(scales) == 18 and all(same_scale(moved[name], scale) for name, scale in scales.items())


def same_scale(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype is torch.float32 and torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------- the folder


def test_quantized_linears_take_half_the_bytes_of_bf16(scored, folder):
    tensors, (model, _) = load_file(folder / "model.safetensors"), load_export(folder)
    names = [name for name, module in model.named_modules() if isinstance(module, HiF8Linear)]
    parts = {name: {k: v for k, v in tensors.items() if k.startswith(f"{name}.")} for name in names}
    for part in parts.values():
        dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in part.items()}
        assert dtypes == {"weight": torch.uint8, "weight_scale": torch.float32, "input_scale": torch.float32}
    assert len(names) == 9 and sum(t.nbytes for part in parts.values() for t in part.values()) == 9 * (64 * 128 + 8)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(names))}
    assert {tensor.dtype for tensor in rest.values()} == {torch.bfloat16} and "lm_head.weight" not in rest
    original = sum(p.numel() for p in Subject(scored, Run.of(scored), "bf16").build()[0].parameters())
    assert sum(t.numel() for t in rest.values()) + 9 * 64 * 128 == original
    assert sum(module.weight.nbytes for module in model.modules() if isinstance(module, HiF8Linear)) == 9 * 64 * 128


def test_the_codes_are_those_of_an_independent_implementation(scored, folder):
    hifloat8 = pytest.importorskip("en_dtypes").hifloat8
    tensors = load_file(folder / "model.safetensors")
    saved = checkpoint.latest(Run.of(scored).checkpoints)[0]["model"]
    quantized = evaluated(scored)
    logits(quantized)
    for name in json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]:
        codes, scale = tensors[f"{name}.weight"].numpy(), tensors[f"{name}.weight_scale"].numpy()
        weight = saved[f"{name}.weight"].bfloat16().float().numpy()
        values = codes.view(hifloat8).astype(np.float32)
        assert np.array_equal(codes, np.clip(weight * scale, -15, 15).astype(hifloat8).view(np.uint8))
        assert np.array_equal(values, quantized.get_submodule(name).rounded_weight.values.float().numpy())
        assert np.array_equal(values, hif8.decode(tensors[f"{name}.weight"]).numpy())
        assert np.unique(codes).size > 50 and np.abs(values / scale - weight).max() < np.abs(weight).max() / 8


def test_large_models_come_in_several_files(scored, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_LARGEST_FILE", "200KB")
    cfg = copy.deepcopy(scored)
    cfg.export.out = str(tmp_path / "shards")
    out = export(cfg)
    assert len(list(out.glob("model-*.safetensors"))) == 3
    assert same(logits(load_export(out)[0]), logits(load_export(folder)[0]))


def test_the_card_tells_what_it_is_and_what_it_scored(scored, folder):
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["tags"] == ["hif8", "w8a8", "quantization-aware-training"]
    assert table(against_baseline(Run.of(scored), "smoke")) in body and "W8A8" in body
    title = f"# {Run.of(scored).id}"
    assert body.lstrip().startswith(f"{title}\n\ntiny (random weights) after quantization-aware training.")
    for words in ("Experiment: exp8, protocol paper, seed 0", "3 steps of 4 × 32", "Scales multiply before rounding"):
        assert words in body
    assert commit_name(Run.of(scored).environment()["git"]) in body  # "unknown" where there is no git
    written = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json"))
    assert getattr(scored, RUNS) not in written and str(scored.data.path) not in written


def test_the_card_tells_in_which_arithmetic_it_was_scored(scored, folder, tmp_path):
    assert "W8A8 is what this folder computes, bit for bit" in (folder / "README.md").read_text()
    runs = shutil.copytree(getattr(scored, RUNS), tmp_path / "runs")
    for path in runs.glob("*/eval.json"):
        results = json.loads(path.read_text())
        for record in results["smoke"].values():
            record["arithmetic"] = "training"
        path.write_text(json.dumps(results))
    card = model_card.card(scored, Run(runs / Run.of(scored).id), *parts_of(folder))
    assert "an FP32 residual stream and logits" in card and "bit for bit" not in card


def test_the_card_carries_the_terms_of_open_pangu(scored, folder, configure, tmp_path):
    pangu = configure(tmp_path, "model=openpangu_1b")
    text = model_card.card(dataclasses.replace(scored, model=pangu.model), Run.of(scored), *parts_of(folder))
    header = yaml.safe_load(text.split("---\n", 2)[1])
    assert header["base_model"] == pangu.model.path == "FreedomIntelligence/openPangu-Embedded-1B"
    assert (header["license"], header["license_name"]) == ("other", "openpangu-model-license-1.0")
    assert "Powered by openPangu. openPangu is a trademark of Huawei" in text and "European Union" in text


def parts_of(folder):
    model = load_export(folder)[0]
    return model, model.config.quantization_config


# ----------------------------------------------------------------------------------------------------------- refusals


def refused(folder, arithmetic=None) -> str:
    with pytest.raises(UserError) as caught:
        load_export(folder, arithmetic)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_foreign_folders_are_not_loaded(scored, tmp_path):
    assert "no export" in refused(tmp_path) and "no export" in refused(tmp_path / "nothing")
    Subject(scored, Run.of(scored), "bf16").build()[0].save_pretrained(tmp_path)
    assert "no export (quant_method hif8 is not in its config.json)" in refused(tmp_path)


def test_damaged_folders_are_not_loaded(copied):
    weights, config = copied / "model.safetensors", copied / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    tensors = safetensors.torch.load(whole)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "cannot be loaded (its weights are not those of SHA256SUMS); export it, or fetch it, again" in refused(
        copied
    )
    (copied / "SHA256SUMS").unlink()  # as in a folder that transformers wrote again
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refused(copied)
    weights.unlink()
    assert "cannot be loaded" in refused(copied)
    scale = tensors.pop(f"{FIRST}.weight_scale")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert f"missing or superfluous: {FIRST}.weight_scale, the first of 1" in refused(copied)
    narrow = {f"{FIRST}.weight_scale": scale, f"{FIRST}.weight": tensors[f"{FIRST}.weight"][:, 1:].contiguous()}
    save_file(tensors | narrow, weights, metadata={"format": "pt"})
    assert f"{FIRST}.weight is [128, 63], config.json makes it [128, 64]" in refused(copied)
    weights.write_bytes(whole)
    for old, new, reason in (
        ('"version": 1', '"version": 2', "version 2 of the format, and this code reads up to 1"),
        ('"format": "hif8"', '"format": "hif9"', "names no known format"),
        (f'"{FIRST}"', '"model.layers.3.mlp.gone"', "the model has no model.layers.3.mlp.gone"),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        assert reason in refused(copied)
    config.write_text(text)
    assert "arithmetic=fp23: unknown value; did you mean 'fp32'?" in refused(copied, "fp23")
    load_export(copied)


@pytest.fixture
def words(scored, texts):
    dotted = ["budget.steps=3", "data.source=files", f"data.path={texts}", f"{RUNS}={getattr(scored, RUNS)}"]
    return [*TINY, *MAX, *dotted]


def test_the_script_exports_a_run_by_its_folder_or_its_words(scored, folder, words, main, tmp_path):
    run = Run.of(scored)
    before = (folder / "model.safetensors").read_bytes()
    code, stdout, stderr = main("export.py", f"run={run.path}", "export.out=out")
    assert (code, stderr) == (0, "") and stdout.startswith("export: out (9 quantized linears in 0.1 MB (0.1 in BF16)")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert main("export.py", *words)[0] == 0 and (folder / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*")) and not list(run.path.glob(".export*"))


def test_only_an_own_export_is_replaced(scored, folder, tmp_path):
    cfg = copy.deepcopy(scored)
    cfg.export.out = str(tmp_path)
    foreign = tmp_path / "thesis.tex"
    foreign.write_text("years of work")
    with pytest.raises(UserError, match=r"exists and is not an export of tiny-hif8-max"):
        export(cfg)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    foreign.unlink()
    export(cfg)
    foreign.write_text("years of work")
    with pytest.raises(UserError, match=r"has thesis\.tex, which is not of the export; move it elsewhere"):
        export(cfg)
    assert foreign.exists() and load_export(tmp_path)


def test_what_has_no_codes_is_refused_in_one_line(config, words, main):
    code, _, stderr = main("export.py", *words, "seed=5")
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.endswith(" is not started; train it first: `python scripts/train.py` with the same overrides\n")
    for more, reason in (
        (
            {"quant.format": "none"},
            r"^tiny-bf16-\S+ is not quantized and has no codes to export; name",
        ),
        ({"quant.weights": False, "quant.activations": False}, r"^quant.weights=false: .* and nothing to export; "),
        ({"export.out": " "}, r"^export.out=' ': must name a folder, as in export.out=results$"),
    ):
        with pytest.raises(UserError, match=reason):
            export(config(*MAX, **more))


def test_a_write_that_fails_leaves_what_was_there(scored, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "card", full)
    with pytest.raises(OSError, match="No space left"):
        export(scored)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(folder.parent.glob(".export*")) and hf_quantizer.METHOD in (folder / "config.json").read_text()
