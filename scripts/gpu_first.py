"""Run on a GPU what would break first, in that order; stop at the first failure and say what to report.

python scripts/gpu_first.py          a quarter of an hour at most; runs and logs go to gpu/first/
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = "gpu/first"
STEP = f"model=openpangu_1b_random model.blocks=4 model.architecture.num_hidden_layers=4 logger=local runs_dir={OUT}"
STEP += " experiment=exp8 budget=gpu data=embedded quant.bf16_blocks=2 warmup.bf16=0.0 budget.checkpoint_every=2"
STEP += " budget.heldout_tokens=1024 budget.validation_tokens=1024 benchmark=smoke validation=none"
TRAIN = f"scripts/train.py {STEP}"
QUESTIONS = "benchmark.tasks.arc_easy.limit=8 ~benchmark.tasks.mmlu_continuation"
STAGES = (  # name, seconds at most, command
    ("kernels", 120, "-m pytest -n0 -x -m gpu tests/quant"),
    ("eager steps", 120, f"{TRAIN} budget.steps=2 budget.compile=false"),
    ("compiled steps, checkpoints", 240, f"{TRAIN} budget.steps=4"),
    ("FP8 products", 180, f"{TRAIN} budget.steps=4 quant.gemm=fp8"),
    ("20 questions", 180, f"scripts/eval.py {STEP} budget.steps=4 {QUESTIONS}"),
)


def main() -> int:
    folder = ROOT / OUT
    folder.mkdir(parents=True, exist_ok=True)
    for name, limit, command in STAGES:
        log, start = folder / f"{name.replace(' ', '_')}.log", time.monotonic()
        with log.open("w") as output:
            try:
                words = [sys.executable, *command.split()]
                code = subprocess.run(words, cwd=ROOT, stdout=output, stderr=output, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                code = f"none after {limit} s"
        print(f"{name}: {time.monotonic() - start:.0f} s, exit code {code}", flush=True)
        if code:
            print("".join(log.read_text().splitlines(keepends=True)[-40:]))
            print(f"Report: stage {name!r}, {log}, `nvidia-smi`, `{sys.executable} -m torch.utils.collect_env`")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
