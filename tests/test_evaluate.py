"""Evaluation: what it writes, what it leaves alone, and that W8A8 and BF16 weights are two different measurements."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from qat import benchmarks, checkpoint, compare, dashboard, data, evaluate, loop, ptq, tracking
from qat.compare import differences
from qat.config import TaskConfig, UserError
from qat.convert import quantized_linears
from qat.evaluate import Subject
from qat.evaluate import evaluate as score
from qat.identity import baseline_of, ptq_mode, untouched_of
from qat.linear import Quantizer
from qat.runs import Run
from qat.scaling import ScaleBank
from tests.conftest import RUNS, TINY, wandb_records
from tests.test_dashboard import parts

TASKS = {"hellaswag": TaskConfig(shots=0, limit=2), "arc_easy": TaskConfig(shots=0, limit=4)}
WORDS = ("experiment=exp8", "optim.lr=1e-4")


def tensors(run: Run) -> dict:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in run.checkpoints.rglob("*.*")}


def silent(cfg):
    """The same, not mirrored."""
    return dataclasses.replace(cfg, logger=dataclasses.replace(cfg.logger, mode="disabled"))


@pytest.fixture(scope="module")
def scored(configure, tmp_path_factory):
    """(configuration of a run that was trained and scored, its comparison, its checkpoint's files before scoring)"""
    cfg = configure(tmp_path_factory.mktemp("scored"), *WORDS, "logger=wandb", **{"benchmark.tasks": TASKS})
    loop.train_with_baseline(silent(cfg))
    before = tensors(Run.of(cfg)) | tensors(Run.of(baseline_of(cfg)))
    score(silent(baseline_of(cfg)))
    return cfg, score(cfg), before


def subjects(cfg) -> dict[str, Subject]:
    untouched, baseline = untouched_of(cfg), baseline_of(cfg)
    named = {
        "untouched": (untouched, untouched, "bf16"),
        "baseline": (baseline, baseline, "bf16"),
        "ptq": (ptq.ptq_of(cfg), baseline, ptq_mode(cfg.quant)),
        "bf16": (cfg, cfg, "bf16"),
        "w8a8": (cfg, cfg, "w8a8"),
    }
    return {name: Subject(each, Run.of(owner), mode) for name, (each, owner, mode) in named.items()}


# ----------------------------------------------------------------------------------------------------- what is written


def test_every_subject_has_its_scores_and_samples(scored):
    cfg = scored[0]
    for name, subject in subjects(cfg).items():
        record = subject.run.evaluations()["smoke"][subject.mode]
        assert record["tasks"].keys() == TASKS.keys() and record["asked"]["benchmark"]["name"] == "smoke"
        for task, row in record["tasks"].items():
            asked = TASKS[task].limit
            assert (row["metric"], row["n"], row["shots"]) == ("acc_norm", asked, 0)
            samples = subject.run.samples("smoke", subject.mode, task)
            assert len(samples) == asked and row["score"] == sum(sample["correct"] for sample in samples) / asked
        for text, sequences in (("embedded", 2), ("wikipedia", 1)):
            heldout = record["heldout"][text]
            assert heldout["tokens"] == 128 * sequences and len(heldout["document_losses"]) == sequences
            assert heldout["loss"] == pytest.approx(sum(heldout["document_losses"]) / sequences)
            assert (heldout["kl"] is None) == (name in ("untouched", "baseline"))
    assert Run.of(cfg).evaluations()["smoke"].keys() == {"bf16", "w8a8"}
    assert Run.of(baseline_of(cfg)).evaluations()["smoke"].keys() == {"bf16", ptq_mode(cfg.quant)}
    untouched = Run.of(untouched_of(cfg))
    assert untouched.status() == {} and untouched.typed_config() == silent(untouched_of(cfg))


def test_the_comparison_is_written_beside_the_run(scored):
    cfg, comparison, _ = scored
    assert Run.of(cfg).comparison() == json.loads(json.dumps(comparison))
    assert (comparison["run"], comparison["baseline"]) == (Run.of(cfg).id, Run.of(baseline_of(cfg)).id)
    assert comparison["untouched"] == Run.of(untouched_of(cfg)).id
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
    wanted = tracking.results(Run.of(cfg), cfg)
    assert {key: shown[key] for key in wanted} == pytest.approx(wanted)
    row = next(row for row in comparison["tasks"] if (row["task"], row["mode"]) == ("arc_easy", "w8a8"))
    assert wanted["w8a8/arc_easy/points"] == row["points"] and wanted["w8a8/arc_easy/p_value"] == row["p_value"]
    assert wanted["loss_ape_percent"] == comparison["loss"]["ape"] and wanted["w8a8/heldout/kl"] > 0


def test_the_dashboard_names_only_what_is_mirrored(scored):
    cfg, comparison, _ = scored
    (records,) = wandb_records(Run.of(cfg).path)
    history = set().union(*(record["history"]["item"] for record in records if record["type"] == "history"))
    summary = set(tracking.results(Run.of(cfg), cfg))
    run_set, panels = parts(dashboard.workspace("someone", "hif8-qat", TASKS))
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
    assert ours["kl"] > plain["kl"] >= 0  # rounding moves the predictions further than 12 steps of training did
    assert ours["text_hash"] == plain["text_hash"]


def quantizers(model) -> list:
    return [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Quantizer | ScaleBank)
    ]


def test_held_out_losses_are_those_of_the_exported_weights(scored):
    cfg = scored[0]
    saved = checkpoint.latest(Run.of(cfg).checkpoints)[0]
    models = {name: subject.build() for name, subject in subjects(cfg).items()}
    for name, (model, tokenizer) in models.items():
        rounded = name in ("w8a8", "ptq")
        assert not model.training and len(quantized_linears(model)) == (9 if rounded else 0)
        assert bool(quantizers(model)) == rounded
        tokens, _, _ = data.heldout(cfg.data, tokenizer, 256)
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        subject = subjects(cfg)[name]
        heldout = subject.run.evaluations()["smoke"][subject.mode]["heldout"]["embedded"]
        assert heldout["loss"] == pytest.approx(loss, abs=1e-5)
    exported, original = (dict(models[name][0].named_parameters()) for name in ("bf16", "untouched"))
    assert all(torch.equal(p.float(), saved["model"][name].bfloat16().float()) for name, p in exported.items())
    assert any(not torch.equal(p, original[name]) for name, p in exported.items())


def test_the_divergence_is_that_of_the_two_predictions(scored):
    cfg = scored[0]
    built = {name: subject.build() for name, subject in subjects(cfg).items()}
    tokens, _, _ = data.heldout(cfg.data, built["w8a8"][1], 256)
    with torch.no_grad():
        ours, theirs = (built[n][0](input_ids=tokens[:, :-1]).logits.double().softmax(-1) for n in ("w8a8", "baseline"))
    divergence = (theirs * (theirs.log() - ours.log())).sum(-1).mean().item()
    heldout = Run.of(cfg).evaluations()["smoke"]["w8a8"]["heldout"]["embedded"]
    assert heldout["kl"] == pytest.approx(divergence, abs=5e-8) and divergence > 1.5e-7


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
    with torch.no_grad():
        model(input_ids=1000 * torch.ones(2, 64, dtype=torch.int64) % 257)
    assert all(torch.equal(value, saved[name]) for name, value in bank.state_dict().items())
    assert not bank.observed.any() and bank.scale.unique().numel() > 9


def test_scoring_again_scores_nothing(scored, monkeypatch, capsys):
    cfg, comparison, _ = scored
    again = silent(cfg)
    runs = {Run.of(each).path / "eval.json" for each in (cfg, baseline_of(cfg), untouched_of(cfg))}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in runs}
    monkeypatch.setattr(benchmarks, "score", lambda *_, **__: pytest.fail("scored again"))
    capsys.readouterr()
    assert json.loads(json.dumps(score(again))) == json.loads(json.dumps(comparison))
    assert score(baseline_of(again)) is None
    assert capsys.readouterr().out.count("scored already") == 5 + 2
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in runs} == before


def test_runs_that_quantize_alike_share_one_ptq(scored, config):
    """Of exp8 and exp7 at its learning rate the baseline is one, and so is its PTQ."""
    cfg = scored[0]
    other = copy.deepcopy(cfg)
    other.scaling.algo, other.quant.ste, other.quant.gradients = "current", "masked", False
    assert Run.of(other).path != Run.of(cfg).path and Run.of(baseline_of(other)).path == Run.of(baseline_of(cfg)).path
    assert ptq_mode(other.quant) == ptq_mode(cfg.quant)
    for key, value in {"scope": ["mlp.down_proj"], "operands": "descaled", "target_weight": 14.0}.items():
        changed = copy.deepcopy(cfg)
        setattr(changed.quant, key, value)
        assert ptq_mode(changed.quant) != ptq_mode(cfg.quant)


def test_another_calibration_is_scored_anew(scored, monkeypatch):
    monkeypatch.setattr(ptq, "SEQUENCES", 4)
    asked = []

    def stop(*_, **__):
        asked.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        score(silent(scored[0]))
    assert asked


def test_a_repetition_on_one_cpu_is_bit_identical(scored, capsys):
    cfg = dataclasses.replace(silent(scored[0]), repeat=1)
    assert not Run.of(cfg).path.exists() and Run.of(untouched_of(cfg)).path == Run.of(untouched_of(scored[0])).path
    loop.train_with_baseline(cfg)
    comparison = score(cfg)
    assert comparison["baseline"] == Run.of(baseline_of(cfg)).id != Run.of(baseline_of(scored[0])).id
    rows = [line for line in capsys.readouterr().out.splitlines() if "bit-identical" in line]
    assert len(rows) == 2 and all("bit-identical: every loss equal" in row and "not bit" not in row for row in rows)
    assert Run.of(scored[0]).id in rows[1] and Run.of(baseline_of(scored[0])).id in rows[0]


@pytest.fixture
def restored(scored, tmp_path):
    """The configuration of the same run, in run folders of a record: without weights."""
    cfg = dataclasses.replace(silent(scored[0]), **{RUNS: str(tmp_path / "restored")})
    shutil.copytree(getattr(scored[0], RUNS), getattr(cfg, RUNS), ignore=shutil.ignore_patterns("checkpoints"))
    return cfg


def forget(run: Run, mode: str) -> None:
    run.write_json("eval.json", {"smoke": {k: v for k, v in run.evaluations()["smoke"].items() if k != mode}})


def test_without_weights_a_scored_run_is_compared_and_nothing_trained(restored, monkeypatch):
    monkeypatch.setattr(loop, "train_again", None)
    assert score(restored)["run"] == Run.of(restored).id


def test_weights_that_are_gone_and_wanted_are_trained_again(restored, scored, capsys):
    """To the same losses: what was scored before still counts."""
    base, run = Run.of(baseline_of(restored)), Run.of(restored)
    before = run.evaluations()["smoke"]
    forget(run, "w8a8")
    score(restored)
    said = capsys.readouterr().out
    assert said.count("its checkpoint is gone, so it is trained again") == 2
    assert f"{base.id} (bf16): scored already" in said and f"{run.id} (bf16): scored already" in said
    after = run.evaluations()["smoke"]
    assert {**after["w8a8"], "seconds": 0} == {**before["w8a8"], "seconds": 0}


def test_what_was_scored_of_other_weights_is_scored_anew(restored, capsys):
    """The baseline's losses were other ones when it was scored: all that stands on it is made again."""
    base, run = Run.of(baseline_of(restored)), Run.of(restored)
    results = base.evaluations()
    for record in results["smoke"].values():
        record["of"] = ["0123456789"] * len(record["of"])
    base.write_json("eval.json", results)
    score(restored)
    said = capsys.readouterr().out
    assert f"{base.id} (bf16): scoring" in said and f"{base.id} ({ptq_mode(restored.quant)}): scoring" in said
    assert f"{run.id} (w8a8): scored already" in said
    assert base.evaluations()["smoke"]["bf16"]["of"] == [base.fingerprint]


def test_other_questions_are_scored_anew(restored, monkeypatch):
    restored.benchmark = dataclasses.replace(restored.benchmark, split="validation")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        score(restored)


def test_of_another_text_the_losses_are_taken_and_the_answers_kept(restored, monkeypatch):
    before = {name: subject.run.evaluations()["smoke"] for name, subject in subjects(restored).items()}
    restored.budget = dataclasses.replace(restored.budget, heldout_tokens=128)
    monkeypatch.setattr(benchmarks, "score", None)
    score(restored)
    for name, subject in subjects(restored).items():
        was, now = (record[subject.mode] for record in (before[name], subject.run.evaluations()["smoke"]))
        assert was["tasks"] == now["tasks"] and was["asked"] != now["asked"]
        assert was["heldout"]["embedded"]["tokens"] == 256 and now["heldout"]["embedded"]["tokens"] == 128
        assert {task: len(subject.run.samples("smoke", subject.mode, task)) for task in TASKS} == {
            task: TASKS[task].limit for task in TASKS
        }


def test_a_documents_loss_is_the_mean_over_its_sequences():
    assert evaluate._means([1.0, 2.0, 5.0, 4.0], torch.tensor([0, 1, 0, 1])) == [3.0, 3.0]
    assert evaluate._means([], torch.tensor([0, 1])) == []


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture
def words(scored, texts):
    folder = getattr(scored[0], RUNS)
    return [*TINY, *WORDS, "data.source=files", f"data.path={texts}", f"{RUNS}={folder}"]


def test_a_run_that_is_not_finished_is_refused_in_one_line(scored, words, main):
    folder = Run.of(scored[0]).path.parent
    before = sorted(path.name for path in folder.iterdir())
    code, _, stderr = main("eval.py", *words, "seed=5")
    assert code == 2 and stderr.count("\n") == 1 and stderr.startswith("error: tiny-bf16-")
    assert (
        "-s5-" in stderr and "is not started; train it first: `python scripts/train.py` with the same words" in stderr
    )
    assert sorted(path.name for path in folder.iterdir()) == before
    run = Run.of(baseline_of(scored[0]))
    status = run.status()
    run.set_status("stopped", 7, 12)
    with pytest.raises(UserError, match=r"is at step 7 of 12; train it first"):
        score(silent(scored[0]))
    run.write_json("status.json", status)


def test_a_run_folder_can_be_named_instead_of_its_words(scored, main, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "evaluate", asked.append)
    run = Run.of(scored[0])
    assert main("eval.py", f"run={run.path}", "benchmark=paper")[0] == 0
    (cfg,) = asked
    assert cfg.benchmark.name == "paper" and Run.of(cfg).path == run.path and cfg.optim == scored[0].optim
    assert cfg.logger == run.typed_config().logger and cfg.logger.name == "wandb"
    assert main("eval.py", f"run={run.path}", "~benchmark.tasks.mmlu", "logger=local")[0] == 0
    assert "mmlu" not in asked[-1].benchmark.tasks and asked[-1].logger.name == "local"
    code, _, stderr = main("eval.py", f"run={run.path.parent}")
    assert (code, stderr.count("\n")) == (2, 1) and "not a run folder (no config.yaml)" in stderr


def test_the_report_shows_the_run(scored, words, main, tmp_path):
    code, stdout, stderr = main("report.py", "report.experiments=[exp8]", "report.out=out", *words)
    assert (code, stderr) == (0, "") and "report: out/report.html and out/report.md" in stdout
    tables = (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    ape = f"{scored[1]['loss']['ape']:.3f}"
    assert ape in tables and ape in page and "HellaSwag" in tables
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "report.md", "loss.png"}
