"""`make suite LAUNCHER=slurm`: the runs of the suite as job arrays, baselines first.

An array begins when all of the one before have ended, well or not: a failure stops nothing else, and the same command
again runs what is missing. `scripts/slurm_job.sh` is an element of an array; conf/hydra/launcher/slurm.yaml is for
sweeps, whose jobs Hydra's launcher submits.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from qat.cli.runner import torchrun_environment
from qat.config import LaunchConfig
from qat.errors import UserError
from qat.runs.job import Job, with_baselines
from qat.utils import distributed
from qat.utils.environment import ROOT

_CPUS = 8  # a GPU


def submit(jobs: Iterable[Job], report: Sequence[str], launch: LaunchConfig, runs_dir: str) -> str:
    """Submit jobs, their baselines and a report; returns a line that says what is queued.

    report: overrides of report.py. Errors: ConfigError for what so many ranks cannot train, before anything is
    submitted; UserError when sbatch refuses.
    """
    jobs = sorted(with_baselines(jobs).values(), key=lambda job: job.cfg.quantized)  # baselines first
    for job in jobs:
        distributed.check_world_size(job.cfg, launch.nodes * launch.ranks)
    total, baselines = len(jobs), sum(not job.cfg.quantized for job in jobs)
    folder = Path(runs_dir) / ".slurm" / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    folder.mkdir(parents=True)
    # Experiments that are sweeps of their own (conf/experiment/exp1.yaml) would otherwise be one here, too.
    lines = [*(["hydra.mode=RUN", *job.overrides] for job in jobs), list(report)]
    (folder / "jobs").write_text("".join(f"{shlex.join(line)}\n" for line in lines), encoding="utf-8")

    def array(name: str, elements: range, script: str, *after: str) -> str:
        span = f"{elements[0]}-{elements[-1]}" if len(elements) > 1 else str(elements[0])
        return _sbatch(name, span, script, after, folder, launch)

    trained = array("baselines", range(baselines), "train.py")
    scored = array("baseline-scores", range(baselines), "eval.py", trained)
    if baselines < total:
        trained = array("runs", range(baselines, total), "train.py", trained)
        scored = array("run-scores", range(baselines, total), "eval.py", trained, scored)
    last = array("report", range(total, total + 1), "report.py", scored)
    return f"{baselines} baselines and {total - baselines} runs are queued; logs: {folder}/; the report is job {last}"


def _sbatch(name: str, array: str, script: str, after: Sequence[str], folder: Path, launch: LaunchConfig) -> str:
    """Submit an array of `script` on lines of the folder's file `jobs`; returns its job number."""
    nodes, gpus = (launch.nodes, launch.ranks) if script == "train.py" else (1, 1)
    command = ["sbatch", "--parsable", "--export=ALL", f"--job-name=hif8-{name}", f"--array={array}"]
    command += [f"--nodes={nodes}", f"--gpus-per-node={gpus}", f"--cpus-per-task={_CPUS * gpus}"]
    command += [f"--dependency=afterany:{':'.join(after)}"] if after else []
    command += [f"--output={folder}/{name}-%a.log", *shlex.split(launch.sbatch), "scripts/slurm_job.sh"]
    command += [sys.executable, str(launch.ranks), str(folder), script]
    try:
        how = {"cwd": ROOT, "env": torchrun_environment(), "stdout": subprocess.PIPE, "text": True}
        done = subprocess.run(command, check=True, **how)
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch: ended with exit code {error.returncode}; it says why above") from error
    return done.stdout.strip().partition(";")[0]  # of "number;cluster"
