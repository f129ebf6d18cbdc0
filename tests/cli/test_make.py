"""The Makefile itself, from the command that users type to the table that they read."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from qat.analysis.compare import against_baseline
from qat.cli import entry
from qat.report.text import table
from qat.runs.folder import Run
from qat.runs.identity import run_id
from scripts import gpu_first
from tests.conftest import ROOT, composed
from tests.models.test_openpangu import BLOCKS, random_weights, write_config, write_tokenizer

# All that `make help` lists but for what installs, tests and cleans up, and runs no script.
TARGETS = re.findall(r"^([a-z_]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
TARGETS = ["exp8", *sorted(set(TARGETS) - {"help", "setup", "test", "torture", "lint", "format", "clean"})]


@pytest.mark.parametrize("target", TARGETS)
def test_a_recipe_runs_a_script_that_is_there(target):
    command = ["make", "-n", target, "READY=", "TESTED=", "A=exp7", "B=exp8", "RECORD=somewhere", "SEEDS=0,1"]
    command += ["RANKS=2", "RUN=a"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    scripts = re.findall(r"scripts/\S*", printed)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    made = ("exp8", "suite", "factorial", "decide", "audit", "ptq", "rerun_noise")
    made += ("sensitivity",)  # which refuses both
    assert ('"seeds=[0,1]" launch.ranks=2' in " ".join(printed.split())) == (target in made)


def test_what_runs_first_on_a_gpu_is_a_valid_configuration():
    trained = set()
    for _, _, command in gpu_first.STAGES:
        script, *words = command.split()
        if script.startswith("scripts/"):
            trained.add(run_id(entry.typed_config(composed(*words))))
        else:
            assert (ROOT / words[-1]).is_dir()
    assert len(trained) == 3  # of one of which the questions are asked


@pytest.mark.parametrize(
    ("words", "seeds"), [([], "0,1,2,3,4,5,6,7"), (["SEED=0"], "0"), (["SEED=3"], "3"), (["SEEDS=0,1"], "0,1")]
)
def test_decide_takes_eight_seeds_unless_it_is_told_which(words, seeds):
    command = ["make", "-n", "decide", "READY=", *words]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'"seeds=[{seeds}]"' in printed


@pytest.mark.parametrize("target", ["sensitivity", "replay"])
def test_what_is_given_beside_a_run_reaches_the_script_which_refuses_it(target):
    command = ["make", "-n", target, "READY=", "RUN=a", "EXP=exp3", "BUDGET=desk", "PROTOCOL=released", "SEED=1"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "seed=1 budget=desk protocol=released experiment=exp3" in printed
    printed = subprocess.run(command[:5], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"seed=", "budget=", "protocol=", "experiment="} & set(re.findall(r"\w+=", printed))


@pytest.mark.slow
def test_make_takes_openpangu_on_two_sharded_ranks_to_the_table_of_differences(texts, tmp_path):
    """One minute: FSDP2 by torchrun, then evaluation, comparison and report, each a process of its own."""
    pangu = tmp_path / "openPangu-Embedded-tiny"
    pangu.mkdir()
    write_tokenizer(pangu)
    write_config(pangu)
    save_file(random_weights(), pangu / "model.safetensors", metadata={"format": "pt"})
    words = ["budget.parallel=fsdp", "model=openpangu_1b", f"model.path={pangu}", f"model.blocks={BLOCKS}"]
    words += ["quant.bf16_blocks=1", "logger=local", "data.source=files", f"data.path={texts}"]
    for name in ("scripts", "conf", "tests"):  # which the Makefile looks into
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "-f", str(ROOT / "Makefile"), "exp8", f"PY={sys.executable}", "READY="]
    command += ["BUDGET=smoke", "RANKS=2", f"ARGS={' '.join(words)}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    runs = [Run(path) for path in (tmp_path / "runs").iterdir()]
    trained = {run.typed_config().quant.format: run for run in runs if run.metrics()}
    assert set(trained) == {"none", "hif8"} and len(runs) == 3  # and the pretrained checkpoint
    for run in trained.values():
        assert run.finished and len(run.metrics()) == 12 and run.environment()["ranks"] == 2
        assert run.typed_config().budget.parallel == "fsdp"
    assert [row["quantized"] for row in trained["hif8"].metrics()] == [False] + 11 * [True]  # after the BF16 warmup
    comparison = against_baseline(trained["hif8"], "smoke")
    assert {row["task"] for row in comparison["tasks"]} == set(trained["hif8"].typed_config().benchmark.tasks)
    assert table(comparison) in done.stdout
    report = tmp_path / "report" / "exp8"
    assert trained["hif8"].id in (report / "report.md").read_text() and (report / "report.html").exists()
