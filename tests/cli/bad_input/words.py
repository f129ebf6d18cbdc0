"""Overrides on the command line, and configuration files; tests/cli/test_cli.py has values that validation refuses."""

from __future__ import annotations

from collections.abc import Callable

from tests.cli.bad_input.mistakes import A_NAME, Case, World

OVERRIDES = [
    # Hydra's own words, in one line.
    Case("experiment=exp9", "Could not find 'experiment/exp9' Available options in 'experiment': exp1 exp2"),
    Case("seed=1.5", "Error merging override seed=1.5 Value '1.5' of type 'float' could not be converted to Integer"),
    # Ours.
    Case("~optim", "optim.lr=null: must have a value"),
    Case("window=64", "window=64: is a group and takes a name; choose one of w1, w16, w256, w30, w64"),
    Case("experiment=exp8 lr=3e-5", "lr=3e-5: is a group and takes a name; choose one of lr1e-4, lr1e-5, lr2e-3"),
    Case("experiment=../model/tiny", "experiment=../model/tiny: leads out of its folder"),
    Case("+optim.lrr=1", "optim.lrr: unknown key; did you mean 'optim.lr'?"),
    Case("+benchmark.tasks.hellaswag.shot=5", "benchmark.tasks.hellaswag.shot: unknown key; did you mean"),
    Case("+benchmark.tasks={../../x:{shots:0}}", f"benchmark.tasks='../../x': {A_NAME}"),
    Case("+benchmark.tasks={mmluu:{shots:0}}", "benchmark.tasks.mmluu: unknown task; did you mean 'mmlu'?"),
    Case("seed=-1", "seed=-1: must lie in [0, 2147483647]; the nearest valid value is 0"),
    Case("model=tiny quant.scope=[mlp.gate_prj]", "quant.scope=mlp.gate_prj: matches no linear of tiny; did you mean"),
    Case("model=tiny run=runs", "run=runs: train.py does not take it; give it the overrides that made a run"),
    Case(
        "experiment=exp8",
        "WORLD_SIZE=99999999999: the environment variable is malformed or not supported; set it as in WORLD_SIZE=2",
        script="plan",
        env={"WORLD_SIZE": "99999999999"},
    ),
    Case("model=tiny", "OMP_NUM_THREADS=99999999999: the environment", env={"OMP_NUM_THREADS": "99999999999"}),
    Case("model=tiny", "999999 ranks cannot share so many micro-", script="plan", env={"WORLD_SIZE": "999999"}),
    Case("runs=[runs]", "runs=['runs']: eval.py does not take it; give it the overrides", script="eval"),
    Case("seeds=[0,1]", "seeds=[0, 1]: train.py does not take it; give it one seed, as in seed=1"),
    Case("export.out=x", "export.out=x: train.py does not take it; leave it out"),
    Case("experiment=exp1 hydra.mode=RUN", "experiment=exp1: rounds nothing; name a quantized", script="ptq"),
    Case("validation=none", "validation=none: claims are about text of another kind than", script="factorial"),
    Case("validation=none", "validation=none: claims are about text of another kind than", script="audit"),
    Case("optim.master_weights=false", 'the audit\'s switch "no master weights" sets this itself', script="audit"),
    Case("runs=[a] benchmark=paper", "benchmark=paper: has no effect beside runs=, which", script="replay"),
    Case("runs=[a,b] seed=1", "seed=1: has no effect beside runs=, leave it out", script="diff"),
    Case("runs=[a] seed=1", "seed=1: has no effect beside runs=, which takes those of", script="report"),
    Case("launch.launcher=slurm", "launch.launcher=slurm: factorial.py does not take it; leave it", script="factorial"),
    Case("report.experiments=[exp7]", "report.experiments=['exp7']: name two, as in", script="diff"),
    Case("report.experiments=[exp7,exp88]", "Could not find 'experiment/exp88'", script="suite"),
    Case("sensitivity.groups=[blocks]", "sensitivity.groups=blocks: unknown value; did you mean 'block'?"),
    Case("sensitivity.groups=[]", "sensitivity.groups=[]: must be some of role, block, projection, linear, once each"),
    Case("sensitivity.task=mmluu", "sensitivity.task=mmluu: unknown value; did you mean 'mmlu'?", script="sensitivity"),
    Case("quant=bf16", "quant.format=none: nothing is rounded, so there is no damage; name", script="sensitivity"),
    Case("runs_dir=", "runs_dir='': must name a folder, as in runs_dir=results"),
    Case('runs_dir="a\tb"', "must name a folder, as in runs_dir=results"),
    Case("report.out=", "report.out='': must name a folder, as in report.out=results", script="suite"),
]


def conf(text: str | bytes) -> Callable[[World], None]:
    """A folder of the user's own with the experiment `mine`."""

    def prepare(world: World) -> None:
        (world / "own" / "experiment").mkdir(parents=True)
        (world / "own" / "experiment" / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


GLOBAL = "# @package _global_\n"
MINE = "--config-dir own experiment=mine"
CONFIGS = [
    Case(MINE, "mine.yaml", conf(f"{GLOBAL}optim:\n  lr: 1\n seed: 2\n")),
    Case(MINE, "a file of the configuration is not text in UTF-8 (", conf(b"\xff\xfe\x00\x01\x02")),
    Case(MINE, "In 'experiment/mine': ConfigKeyError", conf(f"{GLOBAL}optim:\n  lrr: 1\n")),
    Case(MINE, "nowhere", conf(f"{GLOBAL}seed: ${{nowhere}}\n")),
    Case(MINE, f"experiment='../x': {A_NAME}", conf(f"{GLOBAL}experiment: ../x\n")),
]

CASES = [*OVERRIDES, *CONFIGS]
