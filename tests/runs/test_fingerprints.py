"""A path that has come to hold another model or text: refused wherever a run is taken up again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from qat.cli import runner
from qat.errors import UserError
from qat.eval.evaluate import evaluate
from qat.runs import fingerprints
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.train import loop
from tests.conftest import typed
from tests.helpers.models import write_model
from tests.helpers.steps import stopped

SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def cfg(config, texts, tmp_path):
    """A run of two steps on a model, a text and a validation text of its own."""
    write_model(tmp_path / "model", **SIZES)
    for name in ("text", "validation"):
        shutil.copytree(texts, tmp_path / name)
    keys = {"model.source": "hub", "model.path": str(tmp_path / "model"), "model.architecture": None}
    keys |= {"data.path": str(tmp_path / "text"), "validation.name": "other", "validation.source": "files"}
    keys |= {"validation.path": str(tmp_path / "validation"), "quant.bf16_blocks": 0, "model.blocks": 1}
    keys |= {"budget.steps": 2, "budget.checkpoint_every": 1, "budget.accumulation": 1}
    return config("experiment=exp8", **keys)


def another_model(folder: Path) -> None:
    write_model(folder / "model", seed=1, **SIZES)


def another_text(name: str):
    def change(folder: Path) -> None:
        file = sorted((folder / name).iterdir())[5]
        file.write_text(file.read_text()[::-1])  # of the same size

    return change


CHANGES = [("model", another_model), ("data", another_text("text")), ("validation", another_text("validation"))]


@pytest.mark.parametrize(("key", "change"), CHANGES, ids=[key for key, _ in CHANGES])
def test_another_model_or_text_behind_the_same_path_is_refused(cfg, tmp_path, key, change):
    def refused():
        return pytest.raises(
            UserError, match=rf"^{key}\.path=.*: holds other files than .* was made of \(\w+, now \w+\)"
        )

    loop.train(baseline_of(cfg))
    shutil.copytree(tmp_path, tmp_path.with_suffix(".before"))
    change(tmp_path)
    with refused():  # between the baseline and the run
        runner.train_with_baseline(cfg)
    assert not Run.of(cfg).path.exists()
    for folder in ("model", "text", "validation"):  # put back
        shutil.rmtree(tmp_path / folder)
        shutil.copytree(tmp_path.with_suffix(".before") / folder, tmp_path / folder)
    stopped(cfg, 2)
    change(tmp_path)
    with refused():  # at a resume
        loop.train(cfg)
    with refused():  # where everything is finished, or scored
        loop.train(baseline_of(cfg))
    with refused():
        evaluate(baseline_of(cfg))
    (Run.of(baseline_of(cfg)).path / "sources.json").unlink()  # as of a recorded run
    loop.train(baseline_of(cfg))


def test_a_folder_of_parquet_is_known_by_its_footers(config, tmp_path):
    cfg = config(**{"data.source": "hub", "data.path": str(tmp_path / "own"), "validation": None})
    seen = []
    for letter in "aba":
        Dataset.from_dict({"text": [letter * 1000] * 10}).to_parquet(tmp_path / "own" / "0.parquet")
        seen.append(fingerprints.hashes(cfg))
    assert seen[0] == seen[2] != seen[1] and seen[0].keys() == {f"data.path={tmp_path / 'own'}"}


def test_the_embedded_default_is_known_by_what_its_packages_hold(tmp_path):
    found = fingerprints.hashes(typed(tmp_path))
    assert [path.partition("=")[0] for path in found] == ["model.path", "data.path", "validation.path"]
    assert len(set(found.values())) == 3
