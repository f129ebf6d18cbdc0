"""Evaluation: what it writes, what it leaves alone, and that W8A8 and BF16 weights are two different measurements."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F

from qat.analysis import compare
from qat.analysis.compare import differences
from qat.cli import runner
from qat.cli.runner import evaluate_and_compare as score
from qat.data.heldout import load_heldout
from qat.eval import arithmetic, evaluate
from qat.eval.subject import Subject, calibration_batches
from qat.quant.calibrate import calibrate
from qat.quant.convert import convert, quantized_linears
from qat.quant.linear import Quantizer
from qat.quant.scaling import ScaleBank
from qat.report import wandb_workspace
from qat.runs import identity
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of, ptq_mode
from qat.train import checkpoint, wandb_log
from tests.conftest import RUNS, TINY, wandb_records
from tests.helpers.scored import TASKS, WORDS, silent, subjects, tensors
from tests.report.test_wandb_workspace import parts

# ----------------------------------------------------------------------------------------------------- what is written


def test_every_subject_has_its_scores_and_samples(scored):
    cfg = scored[0]
    for name, subject in subjects(cfg).items():
        record = subject.run.evaluations()["smoke"][subject.mode]
        assert record["tasks"].keys() == TASKS.keys() and record["request"]["benchmark"]["name"] == "smoke"
        for task, row in record["tasks"].items():
            asked = TASKS[task].limit
            assert (row["metric"], row["n"], row["shots"]) == ("acc_norm", asked, 0)
            samples = subject.run.samples("smoke", subject.mode, task)
            assert len(samples) == asked and row["score"] == sum(sample["correct"] for sample in samples) / asked
        for text, sequences in (("embedded", 2), ("wikipedia", 1)):
            heldout = record["heldout"][text]
            assert heldout["tokens"] == 128 * sequences and len(heldout["document_losses"]) == sequences
            assert heldout["loss"] == pytest.approx(sum(heldout["document_losses"]) / sequences)
            assert (heldout["kl"] is None) == (name in ("pretrained", "baseline"))
    assert Run.of(cfg).evaluations()["smoke"].keys() == {"bf16", "w8a8"}
    assert Run.of(baseline_of(cfg)).evaluations()["smoke"].keys() == {"bf16", ptq_mode(cfg.quant)}
    pretrained = Run.of(pretrained_of(cfg))
    assert pretrained.status() == {} and pretrained.typed_config() == silent(pretrained_of(cfg))


def test_the_comparison_is_made_of_what_the_folders_hold(scored):
    cfg, comparison, _ = scored
    assert compare.against_baseline(Run.of(cfg), "smoke") == comparison
    assert (comparison["run"], comparison["baseline"]) == (Run.of(cfg).id, Run.of(baseline_of(cfg)).id)
    (origin,) = (record["tasks"] for record in Run.of(pretrained_of(cfg)).evaluations()["smoke"].values())
    assert all(row["pretrained"] == pytest.approx(100 * origin[row["task"]]["score"]) for row in comparison["tasks"])
    assert {(row["task"], row["mode"]) for row in comparison["tasks"]} == {
        (t, m) for t in TASKS for m in ("bf16", "w8a8", "ptq")
    }
    of_texts = [(row["text"], row["mode"]) for row in comparison["heldout"]]
    assert of_texts == [(text, mode) for text in ("embedded", "wikipedia") for mode in ("w8a8", "ptq", "bf16")]
    assert comparison["loss"]["steps"] == 12
    losses = [[row["loss"] for row in Run.of(each).metrics()] for each in (cfg, baseline_of(cfg))]
    assert comparison["loss"]["ape"] == compare.loss_ape(*losses) > 0


def test_weights_and_biases_shows_the_differences(scored):
    cfg, comparison, _ = scored
    (records,) = wandb_records(Run.of(cfg).path)
    about = next(record["run"] for record in records if record["type"] == "run")
    assert (about["job_type"], about["run_group"]) == ("quantized", "exp8")
    shown = {}
    for record in records:
        shown |= record.get("summary", {}).get("update", {})
    wanted = wandb_log.results(Run.of(cfg), cfg, comparison)
    assert {key: shown[key] for key in wanted} == pytest.approx(wanted)
    row = next(row for row in comparison["tasks"] if (row["task"], row["mode"]) == ("arc_easy", "w8a8"))
    assert wanted["w8a8/arc_easy/points"] == row["points"] and wanted["w8a8/arc_easy/p_value"] == row["p_value"]
    assert wanted["loss_ape_percent"] == comparison["loss"]["ape"] and wanted["w8a8/heldout/kl"] > 0


def test_the_dashboard_names_only_what_is_mirrored(scored):
    cfg, comparison, _ = scored
    (records,) = wandb_records(Run.of(cfg).path)
    history = set().union(*(record["history"]["item"] for record in records if record["type"] == "history"))
    summary = set(wandb_log.results(Run.of(cfg), cfg, comparison))
    run_set, panels = parts(wandb_workspace.workspace("someone", "hif8-qat", TASKS))
    lines = [key for panel in panels["Run History Line Plot"] for key in panel.get("metrics", [])]
    bars = [key for panel in panels["Bar Chart"] for key in panel["metrics"]]
    axes = [axis["accessor"] for panel in panels["Parallel Coordinates Plot"] for axis in panel["columns"]]
    assert len(lines) == len(set(lines)) > 15 and set(lines) <= history
    named = [*run_set["runFeed"]["columnPinned"], *axes]
    columns = {key.removeprefix("summary:") for key in named if key.startswith("summary:")}
    settings = {key.removeprefix("config:").replace(".value", "") for key in named if key.startswith("config:")}
    undefined = {f"{row['mode']}/{row['task']}/relative_drop" for row in comparison["tasks"] if not row["baseline"]}
    assert len(columns) > 5 and columns | set(bars) <= summary | undefined
    assert len(settings) == 4 and settings <= differences(Run.of(cfg).config(), {}).keys()


# -------------------------------------------------------------------------------------------------- what is measured


def test_w8a8_and_bf16_weights_are_two_measurements(scored):
    record = Run.of(scored[0]).evaluations()["smoke"]
    ours, plain = (record[mode]["heldout"]["embedded"] for mode in ("w8a8", "bf16"))
    assert ours["loss"] != plain["loss"] and abs(ours["loss"] - plain["loss"]) < 0.1
    assert ours["kl"] > plain["kl"] > -5e-8  # rounding moves the predictions further than 12 steps of training did
    assert ours["text_hash"] == plain["text_hash"]


def quantizers(model) -> list:
    return [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Quantizer | ScaleBank)
    ]


def test_the_control_is_a_damage_that_is_seen(scored, tmp_path):
    """4-bit weights: integers up to 7 in a row's units, and predictions that no other mode comes near."""
    shutil.copytree(scored[0].runs_dir, tmp_path / "runs")
    benchmark = dataclasses.replace(scored[0].benchmark, control=True)
    cfg = dataclasses.replace(scored[0], benchmark=benchmark, runs_dir=str(tmp_path / "runs"))
    baseline = Run.of(baseline_of(cfg))
    comparison = score(silent(cfg))
    rows = {(row["text"], row["mode"]): row for row in comparison["heldout"]}
    assert rows["embedded", "control"]["kl"] > 10 * rows["embedded", "w8a8"]["kl"]
    assert comparison["measures"] and {row["mode"] for row in comparison["measures"]} == set(compare.MODES)
    assert baseline.evaluations()["smoke"]["control"]["weights"] == [baseline.fingerprint] * 2
    model, _ = Subject(baseline_of(cfg), baseline, "control").build()
    weight = model.get_decoder().layers[0].mlp.up_proj.weight.float()
    levels = weight / weight.abs().amax(1, keepdim=True) * 7
    assert (levels - levels.round()).abs().max() < 0.05 and len(levels.round().unique()) == 15


def as_scored(cfg):
    return arithmetic.autocast(arithmetic.name(cfg))


def test_held_out_losses_are_those_of_the_exported_weights(scored):
    cfg = scored[0]
    saved = checkpoint.latest(Run.of(cfg).checkpoints)[0]
    models = {name: subject.build() for name, subject in subjects(cfg).items()}
    for name, (model, tokenizer) in models.items():
        rounded = name in ("w8a8", "ptq")
        assert not model.training and len(quantized_linears(model)) == (9 if rounded else 0)
        assert bool(quantizers(model)) == rounded
        tokens, _, _ = load_heldout(cfg.data, tokenizer, 256)
        with torch.no_grad(), as_scored(cfg):
            logits = model(input_ids=tokens[:, :-1]).logits
        assert logits.dtype == torch.float32
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        subject = subjects(cfg)[name]
        heldout = subject.run.evaluations()["smoke"][subject.mode]["heldout"]["embedded"]
        assert heldout["loss"] == pytest.approx(loss, abs=1e-5)
    exported, original = (dict(models[name][0].named_parameters()) for name in ("bf16", "pretrained"))
    assert all(torch.equal(p.float(), saved["model"][name].bfloat16().float()) for name, p in exported.items())
    assert any(not torch.equal(p, original[name]) for name, p in exported.items())


def test_the_losses_under_calibrated_scales_are_those_of_the_runs_own_weights(scored):
    cfg = scored[0]
    model, tokenizer = subjects(cfg)["bf16"].build()
    bank, _ = convert(model, identity.ptq_of(cfg))
    tokens, _, _ = load_heldout(cfg.data, tokenizer, 256)
    with torch.no_grad(), as_scored(cfg):
        calibrate(model, bank, calibration_batches(identity.ptq_of(cfg), tokenizer))
        bank.freeze()
        logits = model(input_ids=tokens[:, :-1]).logits.float()
    record = Run.of(cfg).evaluations()["smoke"]["w8a8"]
    found = record["qat_weights_ptq_scales"]["heldout"]["embedded"]
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
    assert found["loss"] != record["heldout"]["embedded"]["loss"]
    assert found["text_hash"] == record["heldout"]["embedded"]["text_hash"]
    assert {row["text"] for row in scored[1]["qat"] if "weights" in row} == {"embedded", "wikipedia"}


def test_the_divergence_is_that_of_the_two_predictions(scored):
    cfg = scored[0]
    built = {name: subjects(cfg)[name].build() for name in ("w8a8", "baseline")}
    tokens, _, _ = load_heldout(cfg.data, built["w8a8"][1], 256)
    with torch.no_grad(), as_scored(cfg):
        ours, theirs = (built[n][0](input_ids=tokens[:, :-1]).logits.double().softmax(-1) for n in ("w8a8", "baseline"))
    divergence = (theirs * (theirs.log() - ours.log())).sum(-1).mean().item()
    heldout = Run.of(cfg).evaluations()["smoke"]["w8a8"]["heldout"]["embedded"]
    tolerance = 5e-8  # the FP32 sum over a vocabulary is off by 1e-8
    assert heldout["kl"] == pytest.approx(divergence, abs=tolerance) and divergence > 2 * tolerance  # 0 would fail


# --------------------------------------------------------------------------------------------------- what is left alone


def test_checkpoints_are_not_touched(scored):
    cfg, _, before = scored
    assert len(before) == 5
    assert tensors(Run.of(cfg)) | tensors(Run.of(baseline_of(cfg))) == before


def test_a_scored_model_leaves_its_scales_as_they_were(scored):
    cfg = scored[0]
    model, _ = subjects(cfg)["w8a8"].build()
    bank = next(value for value in quantizers(model) if isinstance(value, ScaleBank))
    saved = checkpoint.latest(Run.of(cfg).checkpoints)[0]["scales"]
    with torch.no_grad(), as_scored(cfg):
        model(input_ids=1000 * torch.ones(2, 64, dtype=torch.int64) % 257)
    assert all(torch.equal(value, saved[name]) for name, value in bank.state_dict().items())
    assert not torch.cat(bank.amaxes).any() and bank.scale.unique().numel() > 9


def test_a_documents_loss_is_the_mean_over_its_sequences():
    assert evaluate._means([1.0, 2.0, 5.0, 4.0], torch.tensor([0, 1, 0, 1])) == [3.0, 3.0]
    assert evaluate._means([], torch.tensor([0, 1])) == []


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture
def words(scored, texts):
    folder = getattr(scored[0], RUNS)
    return [*TINY, *WORDS, "data.source=files", f"data.path={texts}", f"{RUNS}={folder}"]


def test_a_run_folder_can_be_named_instead_of_its_words(scored, main, monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "evaluate_and_compare", asked.append)
    run = Run.of(scored[0])
    assert main("eval.py", f"run={run.path}", "benchmark=paper")[0] == 0
    (cfg,) = asked
    assert cfg.benchmark.name == "paper" and Run.of(cfg).path == run.path and cfg.optim == scored[0].optim
    assert cfg.logger == run.typed_config().logger and cfg.logger.name == "wandb"
    assert main("eval.py", f"run={run.path}", "~benchmark.tasks.lambada", "logger=local")[0] == 0
    assert "lambada" not in asked[-1].benchmark.tasks and asked[-1].logger.name == "local"
    assert main("eval.py", f"run={run.path}", "benchmark.batch_size=3")[0] == 0
    own = run.typed_config().benchmark
    assert asked[-1].benchmark == dataclasses.replace(own, batch_size=3) and own.name == scored[0].benchmark.name
    assert {cfg.validation.name for cfg in asked} == {scored[0].validation.name}
    assert main("eval.py", f"run={run.path}", "benchmark=passages")[0] == 0
    assert (asked[-1].benchmark.name, asked[-1].validation.name, asked[-1].validation.tokens) == ("passages",) * 2 + (
        40960,
    )
    assert main("eval.py", f"run={run.path}", "benchmark=passages", "validation.tokens=256")[0] == 0
    assert asked[-1].validation.tokens == 256


def test_the_report_shows_the_run(scored, words, main, tmp_path):
    code, stdout, stderr = main("report.py", "report.experiments=[exp8]", "report.out=out", *words)
    assert (code, stderr) == (0, "") and "report: out/report.html and out/report.md" in stdout
    tables = (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    ape = f"{scored[1]['loss']['ape']:.3f}"
    assert ape in tables and ape in page and "HellaSwag" in tables
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "report.md", "loss.png"}
