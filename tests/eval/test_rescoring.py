"""Scoring once more: what counts as scored, and what is scored anew when weights, questions or text are other ones."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from qat.cli import runner
from qat.cli.runner import evaluate_and_compare as score
from qat.errors import UserError
from qat.eval import benchmarks, evaluate, subject
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of, ptq_mode
from tests.conftest import RUNS
from tests.helpers.scored import TASKS, silent, subjects
from tests.helpers.synthetic_runs import edit


def test_scoring_again_scores_nothing(scored, monkeypatch, capsys):
    cfg, comparison, _ = scored
    again = silent(cfg)
    runs = {Run.of(each).path / "eval.json" for each in (cfg, baseline_of(cfg), pretrained_of(cfg))}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in runs}
    monkeypatch.setattr(benchmarks, "score", lambda *_, **__: pytest.fail("scored again"))
    capsys.readouterr()
    assert json.loads(json.dumps(score(again))) == json.loads(json.dumps(comparison))
    assert score(baseline_of(again)) is None
    assert capsys.readouterr().out.count("scored already") == 5 + 2
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in runs} == before


def test_runs_that_quantize_alike_share_one_ptq(scored, config):
    """Share baseline and PTQ between exp8 and exp7 at its learning rate."""
    cfg = scored[0]
    other = copy.deepcopy(cfg)
    other.scaling.algo, other.quant.ste, other.quant.gradients = "current", "masked", False
    assert Run.of(other).path != Run.of(cfg).path and Run.of(baseline_of(other)).path == Run.of(baseline_of(cfg)).path
    assert ptq_mode(other.quant) == ptq_mode(cfg.quant)
    for key, value in {"scope": ["mlp.down_proj"], "operands": "descaled", "target_weight": 14.0}.items():
        changed = copy.deepcopy(cfg)
        setattr(changed.quant, key, value)
        assert ptq_mode(changed.quant) != ptq_mode(cfg.quant)


def test_losses_under_another_calibration_are_taken_anew(restored, scored):
    """And a recorded run that has none is left as it is."""
    with_weights(restored, scored[0])
    run = Run.of(restored)
    losses = {}
    for sequences in (4, None):
        results = run.evaluations()
        record = results["smoke"]["w8a8"]
        losses[sequences] = record["qat_weights_ptq_scales"]
        record["qat_weights_ptq_scales"] = {**losses[sequences], "sequences": sequences} if sequences else None
        run.write_json("eval.json", results)
        comparison = score(restored)
        assert [("weights" in row) for row in comparison["qat"]] == [bool(sequences)] * 2
    assert losses[4] == losses[None]


def test_losses_that_another_benchmark_took_are_not_taken_again(restored, scored, monkeypatch):
    """Save on another machine, and of another text. Of text alone, what QAT gains is not split."""
    with_weights(restored, scored[0])
    asked = {name: subject.run.evaluations()["smoke"][subject.mode] for name, subject in subjects(restored).items()}
    restored.benchmark = dataclasses.replace(restored.benchmark, name="text", tasks={})
    taken, (own, other) = [], asked["w8a8"]["heldout"].values()

    def losses(_, __, text, *___) -> dict:
        taken.append(text.hash)
        return (own if text.hash == own["text_hash"] else other) | {"text_hash": text.hash}

    monkeypatch.setattr(evaluate._Scorer, "_losses", losses)
    comparison = score(restored)
    assert not taken and not any("weights" in row for row in comparison["qat"])
    more = dataclasses.replace(restored.validation, tokens=2 * restored.budget.heldout_tokens)
    score(
        dataclasses.replace(restored, validation=more, benchmark=dataclasses.replace(restored.benchmark, name="more"))
    )
    new, count = Counter(taken).most_common(1)[0]
    assert new not in (own["text_hash"], other["text_hash"]) and count == 5
    assert taken.count(own["text_hash"]) == 1 and len(taken) == 6  # the pretrained model's results are named by texts
    taken.clear()
    for each in subjects(restored).values():
        forget(each.run, each.mode, "text")
    monkeypatch.setattr(evaluate.environment, "machine_summary", lambda: "another machine")
    score(restored)
    assert len(taken) == 2 * 5
    records = {name: subject.run.evaluations()["text"][subject.mode] for name, subject in subjects(restored).items()}
    assert records["w8a8"]["qat_weights_ptq_scales"] is None
    assert {record["scored_on"] for record in records.values()} == {"another machine"}


def test_a_repetition_on_one_cpu_is_bit_identical(restored, capsys):
    cfg = dataclasses.replace(restored, repeat=1)
    assert not Run.of(cfg).path.exists() and Run.of(pretrained_of(cfg)).path == Run.of(pretrained_of(restored)).path
    runner.train_with_baseline(cfg)
    comparison = score(cfg)
    assert comparison["baseline"] == Run.of(baseline_of(cfg)).id != Run.of(baseline_of(restored)).id
    rows = [line for line in capsys.readouterr().out.splitlines() if "bit-identical" in line]
    assert len(rows) == 2 and all("bit-identical: every loss equal" in row and "not bit" not in row for row in rows)
    assert Run.of(restored).id in rows[1] and Run.of(baseline_of(restored)).id in rows[0]


@pytest.fixture
def restored(scored, tmp_path):
    """The configuration of the same run, in run folders of a record: without weights."""
    cfg = dataclasses.replace(silent(scored[0]), **{RUNS: str(tmp_path / "restored")})
    shutil.copytree(getattr(scored[0], RUNS), getattr(cfg, RUNS), ignore=shutil.ignore_patterns("checkpoints"))
    return cfg


def with_weights(restored, scored) -> None:
    """Put the weights of a configuration's runs back."""
    for each in (restored, baseline_of(restored)):
        run = Run.of(each)
        shutil.copytree(Path(getattr(scored, RUNS)) / run.id / "checkpoints", run.checkpoints)


def forget(run: Run, mode: str, benchmark: str = "smoke") -> None:
    results = run.evaluations()
    del results[benchmark][mode]
    run.write_json("eval.json", results)


def test_without_weights_a_scored_run_is_compared(restored):
    assert score(restored)["run"] == Run.of(restored).id


def test_weights_that_are_gone_and_wanted_are_trained_again_when_asked(restored, capsys):
    """To the same losses, so what was scored before still counts. Evaluation itself trains nothing."""
    base, run = Run.of(baseline_of(restored)), Run.of(restored)
    before = run.evaluations()["smoke"]
    forget(run, "w8a8")
    with pytest.raises(UserError, match=f"^{run.path}: its checkpoint is gone, .*train it again by .*retrain=true$"):
        score(restored)
    runner.train_with_baseline(restored)  # what is finished stays as it is
    assert not run.checkpoints.exists()
    runner.train_with_baseline(dataclasses.replace(restored, retrain=True))
    assert capsys.readouterr().out.count("its checkpoint is gone, so it is trained again") == 2
    score(restored)
    said = capsys.readouterr().out
    assert f"{base.id} (bf16): scored already" in said and f"{run.id} (bf16): scored already" in said
    after = run.evaluations()["smoke"]
    assert {**after["w8a8"], "seconds": 0} == {**before["w8a8"], "seconds": 0}


def test_a_baseline_whose_weights_are_gone_is_asked_for_before_a_run_is_scored(restored, scored):
    """The run's predictions are compared with its baseline's."""
    run = Run.of(restored)
    forget(run, "w8a8")
    shutil.copytree(Path(getattr(scored[0], RUNS)) / run.id / "checkpoints", run.checkpoints)
    with pytest.raises(UserError, match=f"^{Run.of(baseline_of(restored)).path}: its checkpoint is gone"):
        score(restored)


def test_weights_trained_again_to_other_losses_are_scored_as_a_whole(restored, scored, capsys):
    """As on a GPU: no score of the weights before stands beside those of the weights after."""
    run = Run.of(restored)
    with_weights(restored, scored[0])
    for again in (Run.of(baseline_of(restored)), run):
        edit(again.path / "metrics.jsonl", lambda row: row.update(loss=row["loss"] + 1e-6))
    assert score(restored)["run"] == run.id
    assert f"{run.id} (bf16): scoring" in capsys.readouterr().out
    assert {record["weights"][0] for record in run.evaluations()["smoke"].values()} == {run.fingerprint}


def test_what_was_scored_of_other_weights_is_scored_anew(restored, scored, capsys):
    """The baseline's losses were other ones when it was scored: all that stands on it is made again."""
    with_weights(restored, scored[0])
    base, run = Run.of(baseline_of(restored)), Run.of(restored)
    results = base.evaluations()
    for record in results["smoke"].values():
        record["weights"] = ["0123456789"] * len(record["weights"])
    base.write_json("eval.json", results)
    score(restored)
    said = capsys.readouterr().out
    assert f"{base.id} (bf16): scoring" in said and f"{base.id} ({ptq_mode(restored.quant)}): scoring" in said
    assert f"{run.id} (w8a8): scored already" in said
    assert base.evaluations()["smoke"]["bf16"]["weights"] == [base.fingerprint]


@pytest.mark.parametrize("other", ["questions", "calibration"])
def test_only_what_other_questions_or_calibration_change_is_scored_anew(restored, scored, monkeypatch, capsys, other):
    with_weights(restored, scored[0])
    if other == "questions":
        restored.benchmark = dataclasses.replace(restored.benchmark, split="validation")
    else:
        for module in (subject, evaluate):
            monkeypatch.setattr(module, "CALIBRATION_SEQUENCES", 4)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        score(restored)
    (scoring,) = [line for line in capsys.readouterr().out.splitlines() if ": scoring" in line]
    first = subjects(restored)["pretrained" if other == "questions" else "ptq"]
    assert scoring.startswith(f"{first.run.id} ({first.mode}): scoring")


def test_of_another_text_the_losses_are_taken_and_the_answers_kept(restored, scored, monkeypatch):
    with_weights(restored, scored[0])
    before = {name: each.run.evaluations()["smoke"][each.mode] for name, each in subjects(restored).items()}
    first = subjects(restored)["pretrained"].mode
    restored.budget = dataclasses.replace(restored.budget, heldout_tokens=128)
    monkeypatch.setattr(benchmarks, "score", None)
    score(restored)
    for name, each in subjects(restored).items():
        was, now = before[name], each.run.evaluations()["smoke"][each.mode]
        assert was["tasks"] == now["tasks"] and was["request"] != now["request"]
        assert was["heldout"]["embedded"]["tokens"] == 256 and now["heldout"]["embedded"]["tokens"] == 128
        assert {task: len(each.run.samples("smoke", each.mode, task)) for task in TASKS} == {
            task: TASKS[task].limit for task in TASKS
        }
    # The pretrained checkpoint has one folder for all texts, and keeps the scores that other runs are compared with.
    assert Run.of(pretrained_of(restored)).evaluations()["smoke"][first] == before["pretrained"]


def test_scores_of_the_pretrained_checkpoint_in_records_count(restored, scored, capsys):
    """They are named bf16, whatever their text."""
    origin = subjects(restored)["pretrained"]
    origin.run.write_json("eval.json", {"smoke": {"bf16": origin.run.evaluations()["smoke"][origin.mode]}})
    shutil.move(origin.run.path / "samples/smoke" / origin.mode, origin.run.path / "samples/smoke/bf16")
    assert score(restored)["tasks"] == scored[1]["tasks"]
    assert capsys.readouterr().out.count("scored already") == 5
