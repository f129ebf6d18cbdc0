"""Texts, models and surroundings that are not as they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from qat.models.tokenizer import byte_tokenizer
from tests.cli.bad_input.mistakes import DONE, PLAIN, WEIGHT, Case, World, truncated, unscored


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


def beside(content: bytes | list) -> Callable[[World], None]:
    """A second Parquet file beside a good one: these bytes, or such a column."""

    def prepare(world: World) -> None:
        from datasets import Dataset

        parquet(text=[TEXT] * 20)(world)
        if isinstance(content, bytes):
            (world / "own" / "1.parquet").write_bytes(content)
        else:
            Dataset.from_dict({"text": content}).to_parquet(world / "own" / "1.parquet")

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
    Case(HUB, "cannot be streamed (1.parquet: Parquet file size is 0 bytes; remove it, or make it again)", beside(b"")),
    Case(HUB, "data.path=own: cannot be streamed (Couldn't cast array of type list<", beside([["a"]] * 20)),
    Case(HUB, "its files are not Parquet; make them so by `datasets.load_dataset('own", texts(a_jsonl='{"text": "a"}')),
    Case(HUB, "no held-out document has the 129 tokens of a", parquet(text=[None, "", "a"] * 99)),
    Case(HUB, "data.path=own: ", parquet(content=[TEXT] * 2000)),
    Case(HUB, "data.path=own: cannot be streamed (it has no column named text that", parquet(text=[3] * 2000)),
    Case(
        f"{PLAIN} data.source=hub data.path=HuggingFaceFW/fineweb",
        "data.path=HuggingFaceFW/fineweb: cannot be streamed (",
        began=True,  # the run itself is the first to ask a hub
        env={"HF_HUB_OFFLINE": "1"},
    ),
    Case(f"{PLAIN} data.source=package data.path=nowhere/x", "nowhere/x is not installed: run `make setup`"),
    Case(f"{PLAIN} data.source=package data.path=../x", "../x: not a place in a package; for a folder of your own"),
]


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


def rewriting_json(name: str, **changes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return damage


def adding(token: str) -> Callable[[Path], None]:
    """A token that is read from text, and that the model has no embedding for."""

    def damage(folder: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(AddedToken(token))
        tokenizer.save_pretrained(folder)

    return damage


def without_an_end(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|other|>"))


def lacking(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


HF = f"{PLAIN} model.source=hub model.path=model"
LOADED = "model.path=model: cannot be loaded ("
WEIGHTS = [
    Case(HF, LOADED, model(lacking("model.safetensors"))),
    Case(HF, LOADED, model(lambda folder: truncated(folder / "model.safetensors"))),
    Case(HF, f"model.path=model: has no weights for {WEIGHT} (1 missing)", model(rewriting(lambda t: t.pop(WEIGHT)))),
    Case(
        HF,
        f"model.path=model: has no weights for {WEIGHT} (1",
        model(rewriting(lambda t: t.update({WEIGHT: torch.ones(3)}))),
    ),
]
for case in WEIGHTS:
    case.began = True
CONFIG = "config.json"
MODELS = [
    Case(f"{PLAIN} model.source=hub model.path=nowhere", "model.path=nowhere: cannot be loaded ("),
    Case(HF, LOADED, model(naming("{"))),
    Case(HF, LOADED, model(naming("[]"))),
    Case(HF, LOADED, model(naming('{"model_type": "nonsense"}'))),
    Case(HF, LOADED, model(lacking(CONFIG))),
    Case(HF, LOADED, model(lacking("tokenizer.json", "tokenizer_config.json"))),
    Case(HF, LOADED, model(lambda folder: truncated(folder / "tokenizer.json"))),
    Case(HF, LOADED, model(lambda folder: (folder / "tokenizer.json").write_text("{}"))),
    Case(HF, LOADED, model(rewriting_json("tokenizer_config.json", model_max_length="x"))),
    Case(HF, f"{LOADED}num_hidden_layers=0 must be positive)", model(rewriting_json(CONFIG, num_hidden_layers=0))),
    Case(HF, "num_key_value_heads=3", model(rewriting_json(CONFIG, num_key_value_heads=3))),
    Case(HF, "hidden_act=sillu", model(rewriting_json(CONFIG, hidden_act="sillu"))),
    Case(HF, "head_dim=15", model(rewriting_json(CONFIG, head_dim=15))),
    Case(HF, "Padding_idx must be within num_embeddings", model(rewriting_json(CONFIG, pad_token_id=999))),
    Case(HF, "max_position_embeddings=16 is too few for", model(rewriting_json(CONFIG, max_position_embeddings=16))),
    Case(HF, "max_position_embeddings=100 is too few for", model(rewriting_json(CONFIG, max_position_embeddings=100))),
    Case(HF, "embeddings for 200 tokens (vocab_size=200)", model(rewriting_json(CONFIG, vocab_size=200))),
    Case(HF, "its tokenizer has '<img>' as token 257, and the model", model(adding("<img>"))),
    Case(HF, "no BOS, EOS or <|endoftext|> token", model(without_an_end)),
    Case(f"{PLAIN} model.architecture.num_key_value_heads=3", "model.architecture: makes no causal language model ("),
    Case(f"{PLAIN} model.architecture.num_key_value_heads=0", "(num_key_value_heads=0 must be positive)"),
    Case(f"{PLAIN} model.architecture.hidden_size=-64", "(hidden_size=-64 must be positive)"),
    Case(f"{PLAIN} model.architecture.hidden_size=60", "mend vocab_size=257, hidden_size=60"),
    Case(f"{PLAIN} model.architecture.intermediate_size=0", "(intermediate_size=0 must be positive)"),
    Case(f"{PLAIN} +model.architecture.rope_theta=0", "(rope_theta=0 must be positive)"),
    Case(f"{PLAIN} +model.architecture.head_dim=15", "model.architecture: makes no causal language model ("),
    Case(f"{PLAIN} +model.architecture.hidden_act=sillu", "hidden_act=sillu"),
    Case(f"{PLAIN} model.architecture.vocab_size=100", "model.architecture: its tokenizer has '<|endoftext|>' as"),
    Case(f"{PLAIN} model.architecture.max_position_embeddings=16", "model.architecture: max_position_embeddings=16 is"),
    Case(f"{PLAIN} +model.architecture.hidden_siz=3", "model.architecture.hidden_siz: unknown key; did you mean"),
    Case(f"{PLAIN} model.architecture.num_attention_heads=5", "model.architecture: not a Llama ("),
    Case(f"{PLAIN} model.architecture.hidden_size=wide", "model.architecture: not a Llama ("),
]

ENVIRONMENT = [
    Case(DONE, "texts/00.txt", lambda w: unscored(w.done), "eval", env={"HIF8_CACHE": "texts/00.txt"}),
    Case(DONE, "/dev/null/x", lambda w: unscored(w.done), "eval", env={"HIF8_CACHE": "/dev/null/x"}),
    Case(f"{PLAIN} logger=wandb", "WANDB_MODE=garbage", env={"WANDB_MODE": "garbage"}),
    Case(PLAIN, "OMP_NUM_THREADS=abc", env={"OMP_NUM_THREADS": "abc"}),
    Case(PLAIN, "NUMBA_DISABLE_JIT=1", env={"NUMBA_DISABLE_JIT": "1"}),
    Case(PLAIN, "CUDA_VISIBLE_DEVICES=garbage", env={"CUDA_VISIBLE_DEVICES": "garbage"}),
]

CASES = [*DATA, *WEIGHTS, *MODELS, *ENVIRONMENT]
