"""Loading: the packaged SmolLM2, random models, and what separates documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qat.config import DataConfig, ModelConfig
from qat.data import heldout
from qat.data.tokenize import encode
from qat.errors import UserError
from qat.models import gguf
from qat.models.load import check_model, load_model
from qat.models.loss import token_losses
from qat.models.tokenizer import byte_tokenizer, document_token
from tests.cli.bad_input.mistakes import truncated
from tests.conftest import composed
from tests.helpers.models import write_model

# ---------------------------------------------------------------------------------------------- document separators


class Vocabulary:
    def __init__(self, names: list[str], bos=None, eos=None):
        self.names, self.bos_token_id, self.eos_token_id = names, bos, eos

    def get_vocab(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def test_documents_are_separated_by_what_the_model_was_trained_with():
    smollm2 = Vocabulary(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], bos=0, eos=1)
    assert document_token(smollm2) == 2
    assert document_token(Vocabulary(["<s>", "</s>"], bos=0, eos=1)) == 0
    assert document_token(Vocabulary(["<s>", "<|endoftext|>"], bos=0, eos=1)) == 0  # Phi-3
    assert document_token(Vocabulary(["<|endoftext|>", "<|im_end|>"], eos=1)) == 0  # Qwen
    assert document_token(Vocabulary(["a", "</s>"], eos=1)) == 1
    with pytest.raises(UserError, match="no BOS, EOS"):
        document_token(Vocabulary(["a"]))


# ------------------------------------------------------------------------------------------- random and packaged models


def test_a_random_model_depends_on_its_seed_alone():
    cfg = ModelConfig(name="tiny", source="random", architecture=dict(composed("model=tiny").model.architecture))
    one, same, other = (load_model(cfg, seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


# ------------------------------------------------------------------------------------------------- models of the user's


def hub(folder, generation=None, **changes):
    """A small Llama and its tokenizer as a folder; changes: to its sizes."""
    sizes = dict(composed("model=tiny").model.architecture) | {"num_hidden_layers": 1} | changes
    write_model(folder, **sizes)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig(name="own", source="hub", path=str(folder))


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 0.6},
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"top_k": 20, "typical_p": 0.5, "min_p": 0.1},
        {"early_stopping": True},
        {"output_scores": True},
        {"pad_token_id": -1},
    ],
    ids=str,
)
def test_a_generation_config_that_cannot_be_saved_loses_what_is_in_the_way(flags, tmp_path):
    cfg = hub(tmp_path / "model", flags | {"max_new_tokens": 7})
    check_model(cfg, 128)
    model, _ = load_model(cfg, seed=0)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_sampling_flags_that_can_be_saved_stay(tmp_path):
    flags = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    generation = load_model(hub(tmp_path, flags), seed=0)[0].generation_config
    assert {name: getattr(generation, name) for name in flags} == flags


def test_a_special_token_without_an_embedding_is_read_as_text(tmp_path):
    cfg = hub(tmp_path)
    wider = byte_tokenizer()
    wider.add_special_tokens({"additional_special_tokens": ["<image>"]})
    wider.save_pretrained(tmp_path)
    model, tokenizer = load_model(cfg, seed=0)
    assert wider.encode("a <image>")[-1] == model.config.vocab_size
    ids = encode(tokenizer, ["a <image>"], document_token(tokenizer))[0]
    assert tokenizer.decode(ids) == "<|endoftext|>a <image>" and max(ids) < model.config.vocab_size
    tokenizer.save_pretrained(tmp_path / "saved")  # for chats of an exported model, it is a token still
    assert not AutoTokenizer.from_pretrained(tmp_path / "saved").split_special_tokens


def test_smollm2_reads_english_and_would_relearn_it_if_labels_were_shifted_twice(user_cache):
    """Paper.md, section 4, row 1: the released run starts at a loss of 11.38, a sound model far below."""
    cfg = composed()
    model, tokenizer = load_model(ModelConfig(**cfg.model), seed=0)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and model.config.num_hidden_layers == 30
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert document_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    tokens, _, _ = heldout.load_heldout(DataConfig(**cfg.data), tokenizer, 256)
    assert "Senate and House of Representatives" in tokenizer.decode(tokens.flatten())
    with torch.no_grad():
        losses = {shift: token_losses(model, tokens, shift).mean().item() for shift in ("once", "twice")}
    assert losses["once"] < 4 and losses["twice"] > 8


# ---------------------------------------------------------------------------------------------- the converted model


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGE = {
    f"{damage.__name__} {name}": lambda folder, damage=damage, name=name: damage(folder / name)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS")
    for damage in (truncated, Path.unlink)
} | {"emptied": emptied, "gone": shutil.rmtree}


@pytest.fixture
def gguf_file(tmp_path, monkeypatch) -> Path:
    """A file that is read as a tiny model, and an empty cache."""
    config = LlamaConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer()
    tokenizer.add_tokens(["<|im_end|>", "<|endoftext|>"])
    monkeypatch.setattr(gguf, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda **_: model))
    monkeypatch.setattr(gguf, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda **_: tokenizer))
    monkeypatch.setenv("HIF8_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_without_chat_tokens_is_refused(gguf_file, monkeypatch):
    monkeypatch.setattr(gguf, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda **_: byte_tokenizer()))
    with pytest.raises(UserError, match=r"^tiny\.gguf: its vocabulary has no <\|im_end\|>; give a folder"):
        gguf.converted(gguf_file)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_converted_model_that_is_not_whole_is_made_again(gguf_file, capsys, damage):
    folder = gguf.converted(gguf_file)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS"} <= whole.keys()
    capsys.readouterr()
    assert gguf.converted(gguf_file) == folder and capsys.readouterr().out == ""
    damage(folder)
    warned = folder.exists()
    (folder.parent / f".writing-{folder.name}").mkdir()  # a kill left it
    gguf._matches_checksums.cache_clear()  # another process
    assert gguf.converted(gguf_file) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert capsys.readouterr().out.startswith("warning: ") == warned
    assert [path for path in folder.parent.iterdir() if path.name != ".lock"] == [folder]
