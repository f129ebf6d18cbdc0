"""What README.md and CONTRIBUTING.md show of how to add something is run as it stands there."""

from __future__ import annotations

import copy
import re
import shutil
import textwrap

import pytest
import torch
from hydra import compose

from qat.cli import entry
from qat.cli.validate import CHOICES
from qat.eval.subject import calibration_batches
from qat.models.load import load_model
from qat.quant import formats, ptq, rules
from qat.quant.calibrate import prepare
from qat.runs.identity import ptq_of
from qat.train import loop
from tests.conftest import ROOT, TINY, composing


def shown(page: str, first: str) -> str:
    """The indented block of a page that begins with this line."""
    blocks = re.findall(r"(?:^ {4}.*\n|^\n)+", (ROOT / page).read_text(), re.MULTILINE)
    (block,) = [text for text in map(textwrap.dedent, blocks) if text.lstrip("\n").startswith(first)]
    return block


@pytest.fixture
def composed(monkeypatch, tmp_path, texts):
    """composed(words): a configuration by the registries and conf/ with what the pages add to them."""
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "experiment" / "exp9.yaml").write_text(shown("README.md", "# @package _global_"))
    (conf / "quant" / "int6.yaml").write_text(shown("CONTRIBUTING.md", "format: int6"))
    registries = (rules.RULES, formats.FORMATS, ptq.METHODS)
    before = [dict(registry) for registry in registries]
    exec(shown("README.md", "@rule()"), dict(vars(rules)))
    entry_of_formats = shown("CONTRIBUTING.md", '"int6": Format(')
    formats.FORMATS.update(eval(f"{{{entry_of_formats}}}", dict(vars(formats))))
    exec(shown("CONTRIBUTING.md", "@method()"), dict(vars(ptq)))
    monkeypatch.setitem(CHOICES, "scaling.algo", tuple(rules.RULES))
    monkeypatch.setitem(CHOICES, "quant.format", ("none", *formats.FORMATS))

    def make(*words: str):
        with composing(conf):
            given = ("budget.steps=2", f"data.path={texts}", "data.source=files", f"runs_dir={tmp_path}")
            return entry.typed_config(compose("train", [*TINY, *given, *words]))

    yield make
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


def test_what_the_pages_add_trains(composed):
    cfg = composed("experiment=exp9", "quant=int6", "scaling.algo=headroom", "warmup.bf16=0")
    assert (cfg.experiment, cfg.optim.lr, cfg.scaling.window, cfg.quant.target_weight) == ("exp9", 1e-5, 16, 31)
    assert composed("experiment=exp9").scaling.algo == "max"
    run = loop.train(cfg)
    scales = {row["layer"]: 31 / row["scale"] for row in run.telemetry() if row.get("role") == "weight"}
    names, amax = run.amaxes()
    assert run.finished and len(scales) == 9
    first = dict(zip(names, amax[0].tolist(), strict=True))
    assert scales == {layer: pytest.approx(1.25 * first[f"{layer}/weight"]) for layer in scales}


def test_the_ptq_method_of_the_page_halves_what_weights_are_mapped_to(composed):
    cfg = ptq_of(composed("ptq.rungs=[max,weights_half]"))
    model, tokenizer = load_model(cfg.model, 0)
    model.eval().requires_grad_(False)
    batches = list(calibration_batches(cfg, tokenizer))
    banks = [prepare(copy.deepcopy(model), cfg, ptq.rung(name), batches) for name in ("max", "weights_half")]
    for name, plain, ours in zip(banks[0].names, *(bank.scale for bank in banks), strict=True):
        torch.testing.assert_close(ours, plain / 2 if name.endswith("/weight") else plain)
