"""Compile the training step in many variants for a GPU that is not there, and write a table of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qat.errors import UserError, nearest
from qat.report.text import markdown
from qat.utils.environment import ROOT

PAGE = ROOT / "docs" / "performance.md"
LAUNCHES_A_BLOCK = 60  # of kernels that Inductor writes, forward and backward, at most
_SECTION = re.compile(r"(<!-- gpu_dry: written by `make gpu_dry` -->\n).*?(<!-- end -->)", re.DOTALL)
_BASE = (
    "budget=gpu data=embedded model=openpangu_1b_random logger=local warmup.bf16=0.0 quant.bf16_blocks=1 "
    "budget.arithmetic=bf16 model.blocks=2 model.architecture.num_hidden_layers=2 experiment=exp8"
)
VARIANTS = {  # name -> overrides, beside those of _BASE: two blocks, of which one is quantized
    "max": "",
    "max, 4 blocks": "model.blocks=4 model.architecture.num_hidden_layers=4",
    "BF16 baseline": "quant=bf16",
    "current": "scaling=current",
    "masked, CAGE": "estimator=cage quant.ste=masked",
    "hybrid rounding": "quant.rounding=hybrid",
    "learned scales": "scaling=lsq",
    "all linears": "quant.scope=[mlp.*,self_attn.*]",
    "fp8 products": "quant.gemm=fp8",
    "fp8_e4m3": "quant=fp8_e4m3",
    "fp8_e5m2": "quant=fp8_e5m2",
    "released": "protocol=released",
    "FP32": "budget.arithmetic=fp32",
    "activation checkpointing": "budget.activation_checkpointing=true",
    "distilled": "loss=distill loss.distill=0.5",
    "FSDP2, blocks apart": "budget.parallel=fsdp",
}
_NOT_INTERPRETED = ("activation checkpointing",)  # it saves a GPU's random state; the interpreter has a CPU's
# A model for the interpreter. FP32: a difference is then that of the order of sums, or a fault.
_SMALL = (
    "model.architecture.vocab_size=257 model.architecture.hidden_size=64 model.architecture.intermediate_size=128 "
    "model.architecture.num_attention_heads=4 model.architecture.num_key_value_heads=2 budget.micro_batch=2 "
    "budget.seq_len=32 budget.arithmetic=fp32 optim.lr=1e-12"
)


def check(names: list[str]) -> None:
    """Raise `UserError` for an unknown variant, and without what compiles."""
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"{name}: unknown variant; {nearest(name, list(VARIANTS))}")
    if importlib.util.find_spec("triton") is None or shutil.which("g++") is None:
        raise UserError("gpu_dry compiles with Triton and g++, and one of them is missing: `make test` installs Triton")


def traces(names: list[str]):
    """Yield (name, facts of `qat.tools.gpu_dry.trace.Trace` and `difference` of `qat.tools.gpu_dry.interpret`).

    Errors: UserError when one cannot be compiled.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        surroundings = os.environ | {
            "LD_PRELOAD": str(_preloaded(Path(folder))),
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "HIF8_CACHE": f"{folder}/hif8",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        }

        def facts(name: str) -> dict:
            words = [*_BASE.split(), *VARIANTS[name].split()]
            traced = _answer(name, ["trace", *words], surroundings | {"TRITON_INTERPRET": "0"})
            if name in _NOT_INTERPRETED:
                return traced | {"difference": None}
            interpreted = ["interpret", *words, *_SMALL.split()]
            return traced | {"difference": _answer(name, interpreted, surroundings | {"TRITON_INTERPRET": "1"})}

        yield from zip(names, pool.map(facts, names), strict=True)


def _answer(name: str, words: list[str], surroundings: dict[str, str]):
    """Run a module of this package; return what it prints last."""
    command = [sys.executable, "-m", f"qat.tools.gpu_dry.{words[0]}", *words[1:]]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name}: {words[0]} fails\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _preloaded(folder: Path) -> Path:
    """Compile pretend.cpp."""
    source, torch_folder = Path(__file__).with_name("pretend.cpp"), Path(torch.__file__).parent
    target, libraries = folder / "pretend.so", torch_folder / "lib"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{torch_folder / 'include'}", source, f"-L{libraries}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}", "-o", target], check=True)
    return target


def launches_a_block(rows: dict[str, dict]) -> float:
    """Return by how many launches of written kernels a step grows with a quantized block."""
    return (rows["max, 4 blocks"]["launches"] - rows["max"]["launches"]) / 2


def table(rows: dict[str, dict]) -> str:
    """Return the table in Markdown."""
    columns = {"Graphs": "graphs", "Kernels": "kernels", "Launches": "launches"}
    columns |= {"Registers, most": "registers", "With spills": "spilled"}
    cells = [
        [
            name,
            *(str(facts[key]) for key in columns.values()),
            f"{facts['peak'] / 2**30:.1f}",
            "–" if facts["difference"] is None else f"{facts['difference']:.0e}",
        ]
        for name, facts in rows.items()
    ]
    return markdown(["Variant", *columns, "Peak, GiB", "Differs by"], cells) + "\n"


def write(rows: dict[str, dict]) -> None:
    """Write the table into the page, with the versions it was compiled by."""
    import triton

    about = (
        f"PyTorch {torch.__version__.partition('+')[0]}, Triton {triton.__version__}, compute capability 9.0; "
        f"compiled, not run. A further quantized block takes {launches_a_block(rows):g} launches.\n\n"
    )
    text = PAGE.read_text()
    PAGE.write_text(_SECTION.sub(lambda match: match[1] + about + table(rows) + match[2], text))
