"""Malformed input of every kind: each is answered with one line and exit code 2, and nothing is written or damaged."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from safetensors.torch import load_file, save_file

from qat import checkpoint, loop
from qat.evaluate import evaluate
from qat.models import byte_tokenizer
from qat.runs import Run, baseline_of
from tests.conftest import typed

# A model of four blocks, six steps with a checkpoint after the second and the fourth, four questions.
SMALL = "model=tiny budget=smoke logger=local model.blocks=4 model.architecture.num_hidden_layers=4 quant.bf16_blocks=2"
SMALL += " model.architecture.hidden_size=16 model.architecture.intermediate_size=32 budget.steps=6"
SMALL += " budget.checkpoint_every=2 budget.accumulation=1 data.source=files data.path=texts runs_dir=runs"
SMALL += " ~benchmark.tasks.mmlu ~benchmark.tasks.arc_easy ~benchmark.tasks.arc_challenge"
STOPPED, DONE = f"{SMALL} seed=1", f"{SMALL} seed=0"  # after step 4 of 6; finished and scored
PLAIN = f"{SMALL} quant=bf16 seed=9"  # not begun


@dataclass
class Case:
    """A mistake: the script and its words ({run}: the folder of DONE), what the line must hold, and what prepares it.

    began: the run begins, so that its folder says that it failed and why. In a folder that was there, nothing else
    changes.
    """

    words: str
    wanted: str
    prepare: Callable[[World], None] | None = None
    script: str = "train"
    began: bool = False
    env: dict[str, str] | None = None

    def __str__(self) -> str:
        of = self.words.replace(STOPPED, "stopped").replace(DONE, "done").replace(PLAIN, "plain").replace(SMALL, "")
        return f"{self.script} {of}: {self.wanted[:60]}"


class World:
    """A folder with texts, a model, the finished run of DONE and the stopped one of STOPPED, with its own names."""

    def __init__(self, path: Path):
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def run(self, words: str) -> Run:
        cfg = typed(Path("runs"), *words.split())
        return Run(self.path / Run.of(cfg).path)

    @property
    def done(self) -> Run:
        return self.run(DONE)

    @property
    def stopped(self) -> Run:
        return self.run(STOPPED)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("world"))
    draw = random.Random(0)
    (world / "texts").mkdir()
    for number in range(24):
        text = " ".join("".join(draw.choices("etaoinshrdlu", k=5)) for _ in range(100))
        (world / "texts" / f"{number:02}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.path)
        done = typed(Path("runs"), *DONE.split())
        loop.train_with_baseline(done)
        evaluate(done)
        stopped = typed(Path("runs"), *STOPPED.split())
        loop.train(baseline_of(stopped))
        patch.setattr(loop._Session, "_announce", stopping_before(5))
        with pytest.raises(KeyboardInterrupt):
            loop.train(stopped)
        write_model(done, world / "model")
    return world


def stopping_before(step: int):
    def announce(_, current: int, __) -> None:
        if current == step:
            raise KeyboardInterrupt

    return announce


def write_model(cfg, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**cfg.model.architecture)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


# ------------------------------------------------------------------------------------------- words on the command line

OVERRIDES = [
    Case("experiment=exp9", "experiment=exp9: unknown choice; did you mean 'exp8'?"),
    Case("model=smolm", "model=smolm: unknown choice; did you mean 'smollm2_135m'?"),
    Case("scaling=exp_smoth", "scaling=exp_smoth: unknown choice; did you mean 'exp_smooth'?"),
    Case("window=64", "window=64: a group takes a name; did you mean 'w64'?"),
    Case("lr=1e-4", "lr=1e-4: a group takes a name; did you mean 'lr1e-4'?"),
    Case("optim.lrr=1", "optim.lrr: unknown key; did you mean 'optim.lr'?"),
    Case("sed=3", "sed: unknown key; did you mean 'seed'?"),
    Case("+optim.lrr=1", "optim.lrr: unknown key; did you mean 'optim.lr'?"),
    Case(
        "+benchmark.tasks.mmlu.shot=5",
        "benchmark.tasks.mmlu.shot: unknown key; did you mean 'benchmark.tasks.mmlu'?",
    ),
    Case("benchmark.tasks.mmul.shots=5", "benchmark.tasks.mmul: unknown key; did you mean 'benchmark.tasks.mmlu'?"),
    Case("hydra/launcher=slrum", "hydra/launcher=slrum: unknown choice; did you mean 'slurm'?"),
    Case("hydra.launcher.n_job=2", "hydra.launcher.n_job: unknown key; `--cfg hydra` in the place of `-m` lists those"),
    Case("seed=1.5", "seed=1.5: must be of type Integer"),
    Case("optim.lr=fast", "optim.lr=fast: must be of type Float"),
    Case("optim.lr=null", "optim.lr=null: must have a value"),
    Case("~optim", "optim.lr=null: must have a value"),
    Case("optim=3", "optim=3: is a group; set one of its keys"),
    Case("optim.lr", "optim.lr: not of the form key=value, as in optim.lr=3e-5"),
    Case("quant.weights=maybe", "quant.weights=maybe: must be true or false"),
    Case("quant.scope=mlp.*", "quant.scope=mlp.*: must be a list, as in quant.scope=[mlp.*]"),
    Case("seed=-1", "seed=-1: must lie in [0, 2147483647]; the nearest valid value is 0"),
    Case("repeat=-1", "repeat=-1: must lie in [0, inf]; the nearest valid value is 0"),
    Case("protocol=papr", "protocol=papr: unknown choice; did you mean 'paper'?"),
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
    Case("model=tiny quant.scope=[mlp.gate_prj]", "quant.scope=mlp.gate_prj: matches no linear of tiny; did you mean"),
    Case(
        "model=tiny run=runs",
        "run=runs: train.py does not take it; give it the words that made a run",
    ),
    Case("runs=[runs]", "runs=['runs']: eval.py does not take it; give it the words", script="eval"),
    Case("report.experiments=[exp9]", "experiment=exp9: unknown choice; did you mean 'exp8'?", script="report"),
    Case("report.experiments=[exp7]", "report.experiments=['exp7']: name two, as in", script="diff"),
    Case("report.experiments=[exp7,exp88]", "experiment=exp88: unknown choice; did you mean 'exp8'?", script="diff"),
]

A_NAME = "must be a name of at most 80 letters, digits, '.', '_' and '-' that does not start with '.'"
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
    Case("logger.project=Ünïcode", "logger.project=Ünïcode: Hydra takes such characters only in quotes"),
    Case("experiment=../model/tiny", "experiment=../model/tiny: leads out of its folder"),
    Case("report.experiments=[../../x]", f"report.experiments='../../x': {A_NAME}", script="report"),
    Case("runs_dir=", "runs_dir='': must name a folder, as in runs_dir=results"),
    Case("report.out=", "report.out='': must name a folder, as in report.out=results", script="report"),
    Case('runs_dir="a\tb"', "must name a folder, as in runs_dir=results"),
]


# ------------------------------------------------------------------------------------------------- configuration files


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
    Case(MINE, "optim.lrr: unknown key; did you mean 'optim.lr'?", conf(f"{GLOBAL}optim:\n  lrr: 1\n")),
    Case(MINE, "optim.lr=fast: must be of type Float", conf(f"{GLOBAL}optim:\n  lr: fast\n")),
    Case(MINE, "experiment/mine.yaml: 3 stands where the keys of a group (OptimConfig)", conf(f"{GLOBAL}optim: 3\n")),
    Case(MINE, "nowhere", conf(f"{GLOBAL}seed: ${{nowhere}}\n")),
    Case(MINE, "seed=-1: must lie in", conf(f"{GLOBAL}seed: -1\n")),
    Case(MINE, "scaling=mx: unknown choice", conf(f"{GLOBAL}defaults:\n  - override /scaling: mx\n")),
    Case(MINE, "sclaing", conf(f"{GLOBAL}defaults:\n  - override /sclaing: max\n")),
    Case(MINE, f"benchmark.name='../x': {A_NAME}", conf(f"{GLOBAL}benchmark:\n  name: ../x\n")),
    Case(MINE, f"experiment='../x': {A_NAME}", conf(f"{GLOBAL}experiment: ../x\n")),
    Case("--config-dir nowhere", "nowhere"),
    Case("--config-name nowhere", "nowhere"),
]


# --------------------------------------------------------------------------------------------------------- checkpoints


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def every(damage: Callable[[Path], None], pattern: str, run: str = STOPPED) -> Callable[[World], None]:
    """Damage these files of every checkpoint."""

    def prepare(world: World) -> None:
        files = sorted(world.run(run).checkpoints.glob(f"*/{pattern}"))
        assert files
        for file in files:
            damage(file)
        unscored(world.run(run))

    return prepare


def unscored(run: Run) -> None:
    """What is to be scored is W8A8, the last of four."""
    found = run.evaluations()
    for modes in found.values():
        modes.pop("w8a8", None)
    run.write_json("eval.json", found)


def rewritten(change: Callable[[dict, dict], None], run: str = STOPPED) -> Callable[[World], None]:
    """Change the newest checkpoint's (tensors, facts), and its checksums with them."""

    def prepare(world: World) -> None:
        folder = world.run(run).checkpoints
        tensors, facts = checkpoint.latest(folder)
        change(tensors, facts)
        step = facts.pop("step")
        checkpoint.save(folder, step, tensors, facts)
        unscored(world.run(run))

    return prepare


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def setting(group: str, name: str, value) -> Callable[[dict, dict], None]:
    """value: a tensor, or a function of the one that is there."""

    def change(tensors: dict, _: dict) -> None:
        tensors[group][name] = value(tensors[group][name]) if callable(value) else value

    return change


FIX = "; resume with the configuration it was made with, or delete the run folder"
RETRAIN = "delete the run folder to train it again"
CHECKPOINTS = [
    Case(STOPPED, f"checkpoints: no checkpoint can be read; {RETRAIN}", every(truncated, "model.safetensors")),
    Case(STOPPED, f"checkpoints: no checkpoint can be read; {RETRAIN}", every(flipped, "optimizer.safetensors")),
    Case(STOPPED, f"checkpoints: no checkpoint can be read; {RETRAIN}", every(flipped, "facts.json")),
    Case(STOPPED, f"checkpoints: no checkpoint can be read; {RETRAIN}", every(Path.unlink, "scales.safetensors")),
    Case(DONE, f"checkpoints: no checkpoint can be read; {RETRAIN}", every(flipped, "model.safetensors", DONE), "eval"),
    Case(
        STOPPED,
        f"is of version 99 of the format, and this code reads up to 2: update the code, or {RETRAIN}",
        rewritten(lambda tensors, facts: facts.update(version=99)),
    ),
    Case(
        STOPPED,
        "is of the run another; put it back there, or delete it",
        rewritten(lambda tensors, facts: facts.update(run="another")),
    ),
    Case(STOPPED, f"model.safetensors lacks {WEIGHT}{FIX}", rewritten(lambda t, _: t["model"].pop(WEIGHT))),
    Case(
        STOPPED,
        f"has surplus, which this run does not have{FIX}",
        rewritten(setting("model", "surplus", torch.ones(1))),
    ),
    Case(
        STOPPED,
        f"has {WEIGHT} as float32[16, 32], this run has it as float32[32, 16]{FIX}",
        rewritten(setting("model", WEIGHT, torch.t)),
    ),
    Case(
        STOPPED,
        f"has {WEIGHT} as bfloat16[32, 16], this run has it as float32[32, 16]{FIX}",
        rewritten(setting("model", WEIGHT, torch.Tensor.bfloat16)),
    ),
    Case(
        STOPPED,
        f"optimizer.safetensors lacks {WEIGHT}/exp_avg{FIX}",
        rewritten(lambda t, _: t["optimizer"].pop(f"{WEIGHT}/exp_avg")),
    ),
    Case(
        STOPPED,
        f"optimizer.safetensors lacks model.embed_tokens.weight/exp_avg{FIX}",
        rewritten(lambda t, _: t.pop("optimizer")),
    ),
    Case(
        STOPPED,
        f"has {WEIGHT}/exp_avg_sq as float32[1], this run has it as float32[32, 16]{FIX}",
        rewritten(setting("optimizer", f"{WEIGHT}/exp_avg_sq", torch.ones(1))),
    ),
    Case(
        STOPPED,
        "rng.safetensors holds no state of a random number generator",
        rewritten(setting("rng", "cpu", torch.ones(1).byte())),
    ),
    Case(STOPPED, f"the saved scales have no history of this version{FIX}", rewritten(lambda t, _: t.pop("scales"))),
    Case(
        STOPPED,
        f"the saved scales are not all finite and positive{FIX}",
        rewritten(setting("scales", "scale", lambda scale: scale * float("nan"))),
    ),
    Case(
        STOPPED,
        "the saved scales count 999 of 64 entries",
        rewritten(setting("scales", "counters", torch.tensor([999, 0, 0]))),
    ),
    Case(
        STOPPED,
        "the saved scales are of 1 tensors, this run has",
        rewritten(setting("scales", "history", lambda history: history[:, :1].clone())),
    ),
    Case(
        STOPPED,
        "the saved scales are of other tensors: ",
        rewritten(lambda _, facts: facts["scales"].reverse()),
    ),
    Case(DONE, f"model.safetensors lacks {WEIGHT}{FIX}", rewritten(lambda t, _: t["model"].pop(WEIGHT), DONE), "eval"),
    Case(DONE, "the saved scales have no history", rewritten(lambda t, _: t.pop("scales"), DONE), "eval"),
]
for case in CHECKPOINTS:
    case.began = case.script == "train"


# --------------------------------------------------------------------------------------------------------- run folders


def writing(name: str, text: str | bytes, words: str = DONE) -> Callable[[World], None]:
    """Replace a file of a run folder."""

    def prepare(world: World) -> None:
        path = world.run(words).path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


def breaking(name: str, words: str) -> Callable[[World], None]:
    """Break the second line of a file."""

    def prepare(world: World) -> None:
        path = world.run(words).path / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))

    return prepare


def editing(old: str, new: str) -> Callable[[World], None]:
    """Edit the configuration of DONE."""

    def prepare(world: World) -> None:
        path = world.done.path / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return prepare


def without_its_first_row(world: World) -> None:
    path = world.stopped.path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def file_for_folder(world: World) -> None:
    shutil.rmtree(world.stopped.checkpoints)
    world.stopped.checkpoints.write_text("not a folder")


def folder_for_file(world: World) -> None:
    (world.done.path / "status.json").unlink()
    (world.done.path / "status.json").mkdir()


RUN = "run={run}"
FOLDERS = [
    Case(RUN, "config.yaml is damaged (", writing("config.yaml", "{"), "eval"),
    Case(RUN, "config.yaml is damaged (", writing("config.yaml", "some words"), "eval"),
    Case(RUN, "config.yaml is damaged (", writing("config.yaml", "[1, 2]"), "eval"),
    Case(RUN, "config.yaml is damaged (", writing("config.yaml", b"\xff\x00\x80"), "eval"),
    Case(RUN, "config.yaml is damaged (", writing("config.yaml", ""), "eval"),
    Case(RUN, "config.yaml is damaged (Key 'lrr' not in", editing("  lr:", "  lrr:"), "eval"),
    Case(RUN, "quant.format=hif9: unknown value", editing("format: hif8", "format: hif9"), "eval"),
    Case(RUN, "give the folder that name again", editing("lr: 0.0001", "lr: 0.0002"), "eval"),
    Case(
        RUN,
        f"benchmark.name='../x': {A_NAME}",
        editing("name: smoke\n  batch_size", "name: ../x\n  batch_size"),
        "eval",
    ),
    Case(RUN, "budget.seq_len=1: must lie in", editing("seq_len: 32", "seq_len: 1"), "eval"),
    Case(
        "run=runs/renamed", "give the folder that name again", lambda w: w.done.path.rename(w / "runs/renamed"), "eval"
    ),
    Case(
        f"{RUN} optim.lr=1",
        "optim.lr=1: has no effect beside run=, which takes words of benchmark, logger",
        None,
        "eval",
    ),
    Case(
        f"{RUN} ++benchmark.name=x",
        "++benchmark.name=x: has no effect beside run=, which takes words of export",
        None,
        "export",
    ),
    Case(f"{RUN} seed=1", "seed=1: has no effect beside run=", None, "dashboard"),
    Case("run=nowhere", "nowhere: not a run folder (no config.yaml); see `ls ", script="eval"),
    Case("run=texts", "texts: not a run folder (no config.yaml); see `ls ", script="eval"),
    Case("run=/", "not a run folder (no config.yaml)", script="eval"),
    Case("run=texts/00.txt", "texts/00.txt: not a run folder", script="eval"),
    Case(RUN, "status.json is damaged (", writing("status.json", "{"), "eval"),
    Case(RUN, "status.json is damaged (a mapping was expected, not list)", writing("status.json", "[]"), "eval"),
    Case(RUN, "status.json is damaged ('step' is missing)", writing("status.json", '{"state": "stopped"}'), "eval"),
    Case(RUN, "status.json: Is a directory", folder_for_file, "eval"),
    Case(RUN, "eval.json is damaged (", writing("eval.json", "null"), "eval"),
    Case(RUN, "eval.json is damaged (", writing("eval.json", '{"smoke": 3}'), "eval"),
    Case(RUN, "metrics.jsonl is damaged (", breaking("metrics.jsonl", DONE), "eval"),
    Case(f"{STOPPED} seed=5", "is not started; train it first", script="eval"),
    Case(STOPPED, "is at step 4 of 6; train it first", script="eval"),
    Case(STOPPED, "status.json is damaged (", writing("status.json", "\x00", STOPPED)),
    Case(STOPPED, "metrics.jsonl is damaged (", breaking("metrics.jsonl", STOPPED), began=True),
    Case(STOPPED, "telemetry.jsonl is damaged (", breaking("telemetry.jsonl", STOPPED), began=True),
    Case(STOPPED, "metrics.jsonl is damaged (no row for each of the 4 steps", without_its_first_row, began=True),
    Case(STOPPED, "checkpoints", file_for_folder, began=True),
    Case(f"{SMALL} seed=2 runs_dir=texts/00.txt", "texts/00.txt/tiny-bf16-", script="train"),
    Case(f"{SMALL} seed=2 runs_dir=/dev/null/x", "/dev/null/x", script="train"),
    Case(f"report.experiments=[exp7] report.out=texts/00.txt {DONE}", "texts/00.txt: File exists", script="report"),
]


# ------------------------------------------------------------------------------------------------------- data, models


def texts(**contents: str | bytes) -> Callable[[World], None]:
    """A folder `own` of these files, `_` for the dot in their names."""

    def prepare(world: World) -> None:
        (world / "own").mkdir()
        for name, content in contents.items():
            data = content if isinstance(content, bytes) else content.encode()
            (world / "own" / name.replace("_", ".")).write_bytes(data)

    return prepare


def parquet(damage: Callable[[Path], None] | None = None, **columns: list) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        from datasets import Dataset

        (world / "own").mkdir()
        Dataset.from_dict(columns).to_parquet(world / "own" / "0.parquet")
        if damage:
            damage(world / "own" / "0.parquet")

    return prepare


OWN = f"{PLAIN} data.path=own"
HUB = f"{OWN} data.source=hub"
TEXT = "some words " * 200
DATA = [
    Case(f"{PLAIN} data.path=nowhere", "data.path=nowhere: needs a folder with at least two .txt files, found 0"),
    Case(OWN, "data.path=own: needs a folder with at least two .txt files, found 1", texts(a_txt=TEXT)),
    Case(f"{PLAIN} data.path=texts/00.txt", "data.path=texts/00.txt: needs a folder with at least two .txt files"),
    Case(OWN, "data.path=own: holds no documents to train on", texts(a_txt=TEXT, b_txt="", c_txt=" \n\n ")),
    Case(OWN, "b.txt", texts(a_txt=TEXT, b_txt=b"\xff\xfe\x00w\x80")),
    Case(OWN, "b.txt", texts(a_txt=TEXT, b_txt=bytes(range(256)) * 8)),
    Case(HUB, "data.path=own: ", texts(readme_md="nothing")),
    Case(HUB, "data.path=own: ", parquet(text=[TEXT], damage=truncated)),
    Case(HUB, "data.path=own: ", parquet(content=[TEXT] * 2000)),
    Case(HUB, "data.path=own: cannot be streamed (it has no column named text that", parquet(text=[3] * 2000)),
    Case(
        f"{PLAIN} data.source=hub data.path=HuggingFaceFW/fineweb",
        "data.path=HuggingFaceFW/fineweb: cannot be streamed (",
        env={"HF_HUB_OFFLINE": "1"},
    ),
    Case(f"{PLAIN} data.source=package data.path=nowhere/x", "nowhere/x is not installed: run `make setup`"),
    Case(f"{PLAIN} data.source=package data.path=../x", "../x: not a place in a package; for a folder of your own"),
]
for case in DATA:
    case.began = True


def model(damage: Callable[[Path], None]) -> Callable[[World], None]:
    return lambda world: damage(world / "model")


def rewriting(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def naming(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text)


def lacking(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


HF = f"{PLAIN} model.source=hub model.path=model"
LOADED = "model.path=model: cannot be loaded ("
MODELS = [
    Case(f"{PLAIN} model.source=hub model.path=nowhere", "model.path=nowhere: cannot be loaded ("),
    Case(HF, LOADED, model(naming("{"))),
    Case(HF, LOADED, model(naming("[]"))),
    Case(HF, LOADED, model(naming('{"model_type": "nonsense"}'))),
    Case(HF, LOADED, model(lacking("config.json"))),
    Case(HF, LOADED, model(lacking("model.safetensors"))),
    Case(HF, LOADED, model(lacking("tokenizer.json", "tokenizer_config.json"))),
    Case(HF, LOADED, model(lambda folder: truncated(folder / "model.safetensors"))),
    Case(HF, LOADED, model(lambda folder: truncated(folder / "tokenizer.json"))),
    Case(HF, f"model.path=model: has no weights for {WEIGHT} (1 missing)", model(rewriting(lambda t: t.pop(WEIGHT)))),
    Case(
        HF,
        f"model.path=model: has no weights for {WEIGHT} (1",
        model(rewriting(lambda t: t.update({WEIGHT: torch.ones(3)}))),
    ),
    Case(f"{PLAIN} +model.architecture.hidden_siz=3", "model.architecture.hidden_siz: unknown key; did you mean"),
    Case(f"{PLAIN} model.architecture.num_attention_heads=5", "model.architecture: not a Llama ("),
    Case(f"{PLAIN} model.architecture.hidden_size=wide", "model.architecture: not a Llama ("),
]
for case in MODELS:
    case.began = True

ENVIRONMENT = [
    Case(DONE, "texts/00.txt", lambda w: unscored(w.done), "eval", env={"HIF8_CACHE": "texts/00.txt"}),
    Case(DONE, "/dev/null/x", lambda w: unscored(w.done), "eval", env={"HIF8_CACHE": "/dev/null/x"}),
    Case(f"{PLAIN} logger=wandb", "WANDB_MODE=garbage", env={"WANDB_MODE": "garbage"}),
    Case(PLAIN, "OMP_NUM_THREADS=abc", env={"OMP_NUM_THREADS": "abc"}),
    Case(PLAIN, "CUDA_VISIBLE_DEVICES=garbage", env={"CUDA_VISIBLE_DEVICES": "garbage"}),
]

CASES = [*OVERRIDES, *NAMES, *CONFIGS, *CHECKPOINTS, *FOLDERS, *DATA, *MODELS, *ENVIRONMENT]
BARE = (OVERRIDES, NAMES, CONFIGS)  # these need no world


def snapshot(folder: Path) -> dict[str, str]:
    """What a folder holds: relative path -> hash of the content."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in paths
    }


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch):
    """Hydra composes twice, the first time to see whether the configuration asks for a sweep."""
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_is_answered_in_one_line_and_harms_nothing(case, template, main, tmp_path, monkeypatch):
    world = World(tmp_path)
    if not any(case in kind for kind in BARE):
        shutil.copytree(template.path, tmp_path, dirs_exist_ok=True)
    if case.prepare:
        case.prepare(world)
    for name, value in (case.env or {}).items():
        monkeypatch.setenv(name, value)
    words = case.words.replace("{run}", f"runs/{world.done.id}" if "{run}" in case.words else "")
    before = snapshot(tmp_path)
    code, _, stderr = main(f"{case.script}.py", *words.split(" "))
    *bars, line = stderr.removesuffix("\n").split("\n")
    assert code == 2 and all("step/s" in bar for bar in bars), stderr
    assert line.startswith("error: ") and case.wanted in line and len(line) < 500
    after = snapshot(tmp_path)
    if case.began:
        begun(tmp_path, before, after, line.removeprefix("error: "))
    else:
        assert after == before


def begun(folder: Path, before: dict[str, str], after: dict[str, str], reason: str) -> None:
    """One run folder says that it failed and why; of what was there, nothing else changed."""
    changed = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys()
    (run,) = {Path(*Path(name).parts[:2]) for name in changed if name != "runs"}
    status = json.loads((folder / run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", reason)
    assert {name for name in changed if name in before} <= {f"{run}/status.json", f"{run}/environment.json"}
