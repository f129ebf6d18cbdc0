"""The ladder of PTQ methods: what is scored, and stored, once; and what its page says of planted differences."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qat.cli.experiments import variant
from qat.errors import ConfigError
from qat.eval.evaluate import score
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of, ptq_mode
from qat.studies import ptq
from qat.studies.ptq_page import write
from scripts import docs
from tests.conftest import composing

WORDS = ["model=tiny", "budget=smoke", "logger=local", "ptq.questions=[max]", "benchmark=smoke"]
WORDS += ["~benchmark.tasks.mmlu_continuation", "~benchmark.tasks.lambada"]
OURS = "ptq.rungs=[max,per_channel,rotation,fp8_e4m3]"


def design(*words: str, seeds=(0,)) -> list[ptq.Ladder]:
    with composing():
        return ptq.design("exp8", [*WORDS, *words], variant, seeds)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> ptq.Ladder:
    """Return the ladder of the pretrained model, scored."""
    (made,) = design("ptq.on=pretrained", OURS, f"runs_dir={tmp_path_factory.mktemp('ptq')}")
    score(made.cfg, made.reference, [made.reference, *made.rows.values()])
    return made


def test_rows_are_scored_once_and_stored_under_a_name_each(ladder, capsys):
    run = Run.of(pretrained_of(ladder.cfg))
    stored = run.evaluations()["smoke"]
    assert (
        list(stored) == [ladder.reference.mode, *(row.mode for row in ladder.rows.values())] and len(set(stored)) == 5
    )
    assert {mode: bool(row["tasks"]) for mode, row in stored.items()} == {
        mode: mode in (ladder.reference.mode, ladder.rows["max"].mode) for mode in stored
    }
    assert all(set(row["heldout"]) == {"embedded", "wikipedia"} for row in stored.values())
    assert not run.checkpoints.exists() and run.typed_config().quant.format == "none"
    assert score(ladder.cfg, ladder.reference, [ladder.reference, *ladder.rows.values()]) == []


def test_a_baselines_row_max_is_the_ptq_of_its_run():
    baseline, other = (design(OURS, word)[0] for word in ("ptq.on=baseline", "ptq.sequences=8"))
    cfg = baseline.cfg
    assert baseline.rows["max"].mode == ptq_mode(cfg.quant) != other.rows["max"].mode
    assert baseline.rows["max"].run.path == Run.of(baseline_of(cfg)).path
    assert len({row.mode for row in (*baseline.rows.values(), *other.rows.values())}) == 8
    assert baseline.rows["fp8_e4m3"].mode == ptq_mode(baseline.rows["fp8_e4m3"].cfg.quant)
    assert baseline.rows["fp8_e4m3"].cfg.quant.target_activation == 448


def test_the_page_has_a_row_a_method_and_judges_the_claims(ladder, tmp_path, monkeypatch):
    out = tmp_path / "experiments"
    page = write([ladder], out).read_text()
    assert "<h1>Post-training quantization</h1>" in page and page.count("data:image/svg") == 2
    assert " p is against" not in page and "of 95 % together. A verdict" in page
    found = json.loads((out / "ptq.json").read_text())
    assert [row["rung"] for row in found["rows"]] == list(ladder.rows)
    assert [bool(row["answers"]) for row in found["rows"]] == [True, False, False, False]
    assert found["rows"][0]["max"] == {} and set(found["rows"][1]["max"]) == {"embedded", "wikipedia"}
    assert [claim["key"] for claim in found["claims"]] == ["ties", "rotation", "enough"]
    assert [statement["statement"] for statement in found["claims"][0]["statements"]] == [
        "per_channel less max is within the threshold"
    ]
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert "of benchmark smoke" in docs.claims(out / "ptq.json")


@pytest.mark.parametrize(
    ("harm", "verdicts", "words"),
    [
        (0.0, ["supported"] * 3, ["equivalent", "equivalent"]),
        (0.5, ["contradicted", "supported", "supported"], ["harm", "equivalent"]),
    ],
)
def test_planted_harm_is_found_in_its_row_alone(ladder, tmp_path, harm, verdicts, words):
    copied = Run(tmp_path / ladder.reference.run.id)
    copied.path.mkdir()
    content = ladder.reference.run.evaluations()
    texts = {mode: row["heldout"]["embedded"] for mode, row in content["smoke"].items()}
    for mode, text in texts.items():
        noise = [0.001 * (-1) ** i for i in range(8)]
        change = harm if mode == ladder.rows["per_channel"].mode else 0.0
        text["document_losses"] = [3.0 + change + (each if mode != "bf16" else 0) for each in noise]
        text["loss"] = 3.0 + change
    copied.write_json("eval.json", content)
    (copied.path / "samples").symlink_to(ladder.reference.run.path / "samples")
    copies = {name: _in(copied, row) for name, row in ladder.rows.items()}
    planted = ptq.Ladder(ladder.cfg, [], _in(copied, ladder.reference), copies)
    rows = {row["rung"]: row for row in ptq.rows([planted])}
    assert [rows[name]["max"]["embedded"]["decision"] for name in ("per_channel", "rotation")] == words
    assert [claim["verdict"] for claim in ptq.claims([planted])] == verdicts


def _in(run: Run, subject):
    return dataclasses.replace(subject, run=run)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("quant=fp8_e4m3", "quant=fp8_e4m3: the ladder sets this itself; leave it out"),
        ("quant.activations=false", "the ladder rounds both"),
        ("ptq.rungs=[cast]", "one of them max"),
    ],
)
def test_what_is_no_ladder_is_refused_beforehand(word, says):
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        design(word)


def test_the_library_is_asked_for_only_where_a_row_needs_it(monkeypatch):
    monkeypatch.setattr(ptq.importlib.util, "find_spec", lambda name: None)
    design(OURS)
    with pytest.raises(
        ConfigError, match=r"ptq\.rungs=mse: nvidia-modelopt is not installed; pip install -e '\.\[ptq\]'"
    ):
        design("ptq.rungs=[max,mse]")


@pytest.mark.parametrize("key", ["ptq.on=pretrained", "replay.tensor=x", "sensitivity.tokens=64"])
def test_training_does_not_take_the_keys_of_studies(main, key):
    code, _, error = main("train.py", "experiment=exp8", "model=tiny", "budget=smoke", key)
    assert code == 2 and error == f"error: {key}: train.py does not take it; leave it out\n"
