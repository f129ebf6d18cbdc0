"""Words on the command line, and configuration files."""

from __future__ import annotations

from collections.abc import Callable

from tests.cli.bad_input.mistakes import A_NAME, Case, World

OVERRIDES = [
    # Hydra's own words, in one line.
    Case("experiment=exp9", "Could not find 'experiment/exp9' Available options in 'experiment': exp1 exp2"),
    Case("optim.lrr=1", "Could not override 'optim.lrr'."),
    Case("seed=1.5", "Error merging override seed=1.5 Value '1.5' of type 'float' could not be converted to Integer"),
    Case("~optim", "optim.lr=null: must have a value"),
    Case("optim.lr", "Error parsing override 'optim.lr' missing EQUAL"),
    # Ours.
    Case("window=64", "window=64: is a group and takes a name; choose one of w1, w16, w256, w30, w64"),
    Case("experiment=exp8 lr=3e-5", "lr=3e-5: is a group and takes a name; choose one of lr1e-4, lr1e-5, lr2e-3"),
    Case("+optim.lrr=1", "optim.lrr: unknown key; did you mean 'optim.lr'?"),
    Case("+benchmark.tasks.mmlu.shot=5", "benchmark.tasks.mmlu.shot: unknown key; did you mean"),
    Case("seed=-1", "seed=-1: must lie in [0, 2147483647]; the nearest valid value is 0"),
    Case("repeat=-1", "repeat=-1: must lie in [0, inf]; the nearest valid value is 0"),
    Case("quant.format=hif9", "quant.format=hif9: unknown value; did you mean 'hif8'?"),
    Case(
        "quant.bf16_blocks=30",
        "quant.bf16_blocks=30: smollm2_135m has 30 blocks, so nothing would be quantized; the largest",
    ),
    Case(
        "budget.batch_factor=0.25 budget.micro_batch=2 budget.accumulation=1",
        "budget.accumulation=1: times batch_factor=1/4 is no whole number",
    ),
    Case("model.source=random", "model.architecture=null: model.source=random needs sizes, as in model=tiny"),
    Case(
        "model.path=null",
        "model.path=null: model.source=package needs one, as in model.path=HuggingFaceTB/SmolLM2-135M",
    ),
    Case("model.revision=main", "model.revision=main: model.source=package has none; leave it out"),
    Case("data.revision=main", "data.revision=main: data.source=package has none; leave it out"),
    Case("data.subset=en", "data.subset=en: data.source=package has none; leave it out"),
    Case("validation.label_shift=twice", "validation.label_shift=twice: has no effect on a text that is only measured"),
    Case("model=tiny quant.scope=[mlp.gate_prj]", "quant.scope=mlp.gate_prj: matches no linear of tiny; did you mean"),
    Case(
        "model=tiny run=runs",
        "run=runs: train.py does not take it; give it the overrides that made a run",
    ),
    Case("runs=[runs]", "runs=['runs']: eval.py does not take it; give it the overrides", script="eval"),
    Case("report.experiments=[exp7]", "report.experiments=['exp7']: name two, as in", script="diff"),
    Case("report.experiments=[exp7,exp88]", "Could not find 'experiment/exp88'", script="diff"),
]

NAMES = [
    Case("model.name=../../x", f"model.name='../../x': {A_NAME}"),
    Case("data.name=/etc/x", f"data.name='/etc/x': {A_NAME}"),
    Case("benchmark.name=../x", f"benchmark.name='../x': {A_NAME}"),
    Case("benchmark.name=..", f"benchmark.name='..': {A_NAME}", script="eval"),
    Case(f"benchmark.name={'x' * 300}", A_NAME),
    Case("+benchmark.tasks={../../x:{shots:0}}", f"benchmark.tasks='../../x': {A_NAME}"),
    Case("budget.name=.hidden", f"budget.name='.hidden': {A_NAME}"),
    Case("+benchmark.tasks={mmluu:{shots:0}}", "benchmark.tasks.mmluu: unknown task; did you mean 'mmlu'?"),
    Case(
        "~benchmark.tasks.mmlu ~benchmark.tasks.hellaswag ~benchmark.tasks.arc_easy ~benchmark.tasks.arc_challenge",
        "benchmark.tasks={}: nothing to evaluate; name some of mmlu, hellaswag, arc_easy, arc_challenge",
    ),
    Case("logger.project=a/b?c", f"logger.project='a/b?c': {A_NAME}"),
    Case("experiment=../model/tiny", "experiment=../model/tiny: leads out of its folder"),
    Case("report.experiments=[../../x]", f"report.experiments='../../x': {A_NAME}", script="report"),
    Case("runs_dir=", "runs_dir='': must name a folder, as in runs_dir=results"),
    Case("report.out=", "report.out='': must name a folder, as in report.out=results", script="report"),
    Case('runs_dir="a\tb"', "must name a folder, as in runs_dir=results"),
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
    Case(MINE, "mine.yaml", conf(f"{GLOBAL}optim:\n\tlr: 1\n")),
    Case(MINE, "mine.yaml", conf(f"{GLOBAL}optim: {{lr: 1\n")),
    Case(MINE, "a file of the configuration is not text in UTF-8 (", conf(b"\xff\xfe\x00\x01\x02")),
    Case(MINE, "mine", conf(f"{GLOBAL}- lr\n- seed\n")),
    Case(MINE, "In 'experiment/mine': ConfigKeyError", conf(f"{GLOBAL}optim:\n  lrr: 1\n")),
    Case(MINE, "nowhere", conf(f"{GLOBAL}seed: ${{nowhere}}\n")),
    Case(MINE, "seed=-1: must lie in", conf(f"{GLOBAL}seed: -1\n")),
    Case(MINE, "Could not find 'scaling/mx'", conf(f"{GLOBAL}defaults:\n  - override /scaling: mx\n")),
    Case(MINE, f"benchmark.name='../x': {A_NAME}", conf(f"{GLOBAL}benchmark:\n  name: ../x\n")),
    Case(MINE, f"experiment='../x': {A_NAME}", conf(f"{GLOBAL}experiment: ../x\n")),
    Case("--config-dir nowhere", "nowhere"),
    Case("--config-name nowhere", "nowhere"),
]

CASES = [*OVERRIDES, *NAMES, *CONFIGS]
