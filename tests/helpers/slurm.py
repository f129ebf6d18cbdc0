"""A SLURM of one machine: `sbatch`, `srun` and `scontrol` in a folder for the PATH, which run what they are given.

`sbatch` runs the elements of an array one after another before it returns, so that every dependency is met; it leaves
what it was told in `submitted.jsonl`. `srun` starts one process for each of a job's nodes, by $FAKE_PYTHON in the
place of Python where that is set, and leaves their ids in `processes`. A requeued element runs again.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

COMMANDS = {
    "sbatch": f'PYTHONPATH="{_ROOT}" exec {shlex.quote(sys.executable)} -m tests.helpers.slurm "$@"',
    "srun": """while [[ $1 == --* ]]; do shift; done
python=${FAKE_PYTHON:-$1}; shift
for ((node = 0; node < SLURM_NNODES; node++)); do "$python" "$@" & processes+=($!); done
echo "${processes[@]}" > "$FAKE_SLURM/processes"
for each in "${processes[@]}"; do wait "$each" || code=$?; done
exit ${code:-0}""",
    "scontrol": """[ "$1" = requeue ] && exec touch "$FAKE_SLURM/requeued-$2"
[ "$1 $2" = "show hostnames" ] && printf '%s\\n' ${3//,/ }""",
}


def install(folder: Path) -> dict[str, str]:
    """Put the commands into `folder`; returns the environment that finds them."""
    folder.mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def submitted(folder: Path) -> list[dict[str, str]]:
    """Return what every `sbatch` was told: its options, and as "script" what came after them."""
    return [json.loads(line) for line in (folder / "submitted.jsonl").read_text().splitlines()]


def sbatch(words: list[str]) -> None:
    folder = Path(os.environ["FAKE_SLURM"])
    given = list(itertools.takewhile(lambda word: word.startswith("--"), words))
    script = words[len(given) :]
    directives = re.findall(r"^#SBATCH (--\S+)$", Path(script[0]).read_text(), re.MULTILINE)
    options = dict(each.lstrip("-").partition("=")[::2] for each in (*directives, *given))
    with (folder / "submitted.jsonl").open("a") as file:
        file.write(json.dumps(options | {"script": script}) + "\n")
    job = 100 * len(submitted(folder))
    first, _, last = options["array"].partition("-")
    for element in range(int(first), int(last or first) + 1):
        _run(folder, options, script, job, element)
    print(f"{job};cluster")


def _run(folder: Path, options: dict, script: list[str], job: int, element: int) -> None:
    nodes = int(options["nodes"])
    environment = os.environ | {
        "SLURM_JOB_ID": str(job + element),
        "SLURM_ARRAY_JOB_ID": str(job),
        "SLURM_ARRAY_TASK_ID": str(element),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
    }
    requeued = folder / f"requeued-{job}_{element}"
    with open(options["output"].replace("%a", str(element)), "ab") as log:
        for restart in itertools.count():
            environment |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
            subprocess.run(["bash", *script], env=environment, stdout=log, stderr=log)
            if not requeued.exists():
                break
            requeued.unlink()


if __name__ == "__main__":
    sbatch(sys.argv[1:])
