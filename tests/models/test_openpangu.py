"""openPangu as a Llama without its code: its files, against an independent forward pass and SentencePiece itself."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, LlamaTokenizer

from qat.config import ModelConfig
from qat.data import tokenize
from qat.errors import UserError
from qat.models.load import load_model
from qat.models.tokenizer import SentencePiece, document_token
from tests.conftest import ROOT
from tests.helpers.hub import COMMIT, Hub

HIDDEN, INNER, BLOCKS, HEADS, KV_HEADS, HEAD = 32, 64, 2, 4, 2, 8
THETA, EPS = 4e6, 1e-5  # as openPangu-Embedded-1B's


# ------------------------------------------------------------------------------- a checkpoint folder as on the hub


SENTENCES = (
    "The state of the union is strong, and the people are the reason why.",
    "We choose to do these things because they are hard, not because they are easy.",
    "It is not 1789 or 1941; the world has changed, and so have we.",
    "Members of Congress: let us work together for the people of this union.",
)
# What the rebuilding of a SentencePiece model as byte-pair encoding may miss, beside plain text.
HARD = ("The  state   of", "  leading", "trailing  ", "a\nb\n\nc\td", "naïve café 中国 🙂", "12,345", "ﬁ ① Ａ", "")
HARD += (" ", "▁the", "x<s>y</s>z", "[unused10] the", "people.\r\nworld")
VOCABULARY = 340


@functools.cache
def sentencepiece(**settings) -> SentencePieceProcessor:
    """A model trained on SENTENCES, with bytes for what it does not know, as openPangu's."""
    usual = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    usual |= {"user_defined_symbols": "[unused9],[unused10]", "vocab_size": VOCABULARY, "hard_vocab_limit": False}
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, byte_fallback=True, minloglevel=2, **usual | settings
    )
    return SentencePieceProcessor(model_proto=out.getvalue())


def write_tokenizer(folder, **settings) -> SentencePieceProcessor:
    trained = sentencepiece(**settings)
    (folder / "tokenizer.model").write_bytes(trained.serialized_model_proto())
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    names = ("<unk>", "<s>", "</s>", "[unused9]", "[unused10]")
    special = {str(trained.piece_to_id(name)): {"content": name, **flags, "special": True} for name in names}
    settings = {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": special}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}, "sp_model_kwargs": {}}
    settings |= {"bos_token": "<s>", "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": "PanguTokenizer", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return trained


def write_config(folder) -> None:
    code = {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"}
    code |= {"AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM"}
    config = {"architectures": ["PanguEmbeddedForCausalLM"], "auto_map": code, "model_type": "PanguEmbedded"}
    config |= {"bias": True, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02}
    config |= {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 4, "vocab_size": VOCABULARY}
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "rms_norm_eps": EPS}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rope_theta": THETA, "use_cache": True}
    config |= {"max_position_embeddings": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.53.2"}))
    generation = {"bos_token_id": 1, "eos_token_id": 4, "do_sample": True, "temperature": 1.0, "top_k": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def random_weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * size).bfloat16()

    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
        "model.norm.weight": 1 + normal(HIDDEN, size=0.1),
    }
    for block in range(BLOCKS):
        name = f"model.layers.{block}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}{norm}.weight"] = 1 + normal(HIDDEN, size=0.1)
        for which, out in {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD, "o": HIDDEN}.items():
            weights[f"{name}self_attn.{which}_proj.weight"] = normal(out, HIDDEN, size=0.3)
            weights[f"{name}self_attn.{which}_proj.bias"] = normal(out)
        for which, shape in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items():
            weights[f"{name}mlp.{which}_proj.weight"] = normal(*shape, size=0.3)
    return weights


@pytest.fixture(scope="module")
def pangu(tmp_path_factory):
    """(folder, its weights), in the layout of openPangu-Embedded-1B on the hub. Its code raises when it is run."""
    folder = tmp_path_factory.mktemp("openPangu")
    write_tokenizer(folder)
    write_config(folder)
    for name in ("configuration_openpangu_dense", "modeling_openpangu_dense", "tokenization_openpangu"):
        (folder / f"{name}.py").write_text("raise RuntimeError('remote code was run')\n")
    weights = random_weights()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, {name: weight.float() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def loaded(pangu):
    return load_model(ModelConfig(name="openpangu", source="hub", path=str(pangu[0])), seed=0)


# -------------------------------------------------------------------------- the architecture in plain PyTorch


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions for [..., length, HEAD]: element i is paired with element i + HEAD / 2."""
    length, half = x.shape[-2], HEAD // 2
    angle = torch.arange(length)[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(x: torch.Tensor, w: dict, name: str, theta: float) -> torch.Tensor:
    def project(which: str) -> torch.Tensor:
        y = x @ w[f"{name}{which}_proj.weight"].T + w[f"{name}{which}_proj.bias"]
        return y.view(*x.shape[:2], -1, HEAD).transpose(1, 2)

    q, k, v = rotate(project("q"), theta), rotate(project("k"), theta), project("v")
    k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    y = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2) @ w[f"{name}o_proj.weight"].T + w[f"{name}o_proj.bias"]


def pangu_logits(tokens: torch.Tensor, w: dict, theta: float = THETA) -> torch.Tensor:
    x = w["model.embed_tokens.weight"][tokens]
    for block in range(BLOCKS):
        name = f"model.layers.{block}."
        x = x + attention(rms_norm(x, w[f"{name}input_layernorm.weight"]), w, f"{name}self_attn.", theta)
        y = rms_norm(x, w[f"{name}post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{name}mlp.{which}_proj.weight"].T for which in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{name}mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def test_openpangu_computes_what_its_architecture_says(pangu, loaded):
    model, _ = loaded
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    torch.testing.assert_close(logits, pangu_logits(tokens, pangu[1]), rtol=1e-4, atol=1e-4)
    # The comparison would notice another base of the rotary positions, a missing bias or a lost block.
    wrong = [pangu_logits(tokens, pangu[1], theta=1e4)]
    for part in ("self_attn.o_proj.bias", "self_attn.k_proj.bias", "mlp.down_proj.weight"):
        changed = {name: 0 * w if name.endswith(f"1.{part}") else w for name, w in pangu[1].items()}
        wrong.append(pangu_logits(tokens, changed))
    assert all((logits - other).abs().max() > 0.01 for other in wrong)


def test_openpangu_has_biases_only_in_attention_and_fp32_weights(pangu, loaded):
    parameters = dict(loaded[0].named_parameters())
    assert parameters.keys() == pangu[1].keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, pangu[1][name]) for name, p in parameters.items())
    assert {name.split(".")[-2] for name in parameters if name.endswith("bias")} == {f"{w}_proj" for w in "qkvo"}
    assert loaded[0].training and loaded[0].config.rope_parameters["rope_theta"] == THETA


def test_openpangus_tokenizer_is_read_without_its_code(loaded):
    tokenizer, own = loaded[1], sentencepiece()
    texts = [*SENTENCES, *HARD]
    assert tokenize.encode(tokenizer, texts, 1) == [[1, *own.encode(text)] for text in texts]
    assert all(tokenizer(text).input_ids == [1, *own.encode(text)] for text in texts)  # add_bos_token, as lm-eval asks
    assert tokenizer.decode(own.encode("naïve café 中国")) == "naïve café 中国"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 4, 0)
    assert tokenizer.convert_ids_to_tokens(4) == "[unused10]" and document_token(tokenizer) == 1
    assert len(tokenizer) == len(own) <= VOCABULARY


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"user_defined_symbols": "[unused9],[unused10],\n,  "},
        {"add_dummy_prefix": False},
    ],
)
def test_a_sentencepiece_model_of_any_kind_gives_its_own_tokens(settings, tmp_path):
    own = write_tokenizer(tmp_path, **settings)
    texts = [*SENTENCES, *HARD]
    tokenizer = SentencePiece.from_pretrained(tmp_path)
    expected = [own.encode(text) for text in texts]
    assert tokenizer(texts, add_special_tokens=False).input_ids == expected
    rebuilt = LlamaTokenizer.from_pretrained(tmp_path)  # what transformers would have read
    assert rebuilt(texts, add_special_tokens=False).input_ids != expected
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is SentencePiece and again(texts, add_special_tokens=False).input_ids == expected


def test_code_that_comes_with_another_model_is_not_run_either(pangu, tmp_path):
    config = json.loads((pangu[0] / "config.json").read_text()) | {"model_type": "SomethingElse"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_openpangu_dense.py").write_text("raise RuntimeError('remote code was run')\n")
    with pytest.raises(
        UserError, match=r"^model\.path=.*cannot be loaded \(.*\); give a folder or a reachable hub id$"
    ):
        load_model(ModelConfig(name="other", source="hub", path=str(tmp_path)), seed=0)


def copy_of(folder, target, weights: dict | None = None):
    """The folder at another place, with other weights."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    if weights is not None:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(name="openpangu", source="hub", path=str(target))


def test_a_checkpoint_in_shards_is_the_same_model(pangu, loaded, tmp_path):
    cfg, weights = copy_of(pangu[0], tmp_path), random_weights()
    (tmp_path / "model.safetensors").unlink()
    names, shards = list(weights), {}
    for number in (0, 1):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[number::2]}, tmp_path / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(names[number::2], file)
    index = {"metadata": {"total_size": sum(2 * w.numel() for w in weights.values())}, "weight_map": shards}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = load_model(cfg, seed=0)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), loaded[0].parameters(), strict=True))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.path=[^\n]+model-00002-of-00002\.safetensors[^\n]+$"):
        load_model(cfg, seed=0)


LACKING, SPARE = "model.layers.1.self_attn.o_proj.bias", "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({LACKING: None}, f"has no weights for {LACKING} (1 missing); download it again"),
        ({LACKING: torch.zeros(HIDDEN + 1)}, f"has no weights for {LACKING} (1 missing); download it again"),
        ({SPARE: torch.zeros(INNER, HIDDEN)}, f"{SPARE} is no weight of its architecture (1 such); config.json and "),
    ],
    ids=["lacking", "of another shape", "superfluous"],
)
def test_a_checkpoint_of_other_weights_is_refused(change, said, pangu, tmp_path):
    weights = {name: weight for name, weight in (random_weights() | change).items() if weight is not None}
    with pytest.raises(UserError) as caught:
        load_model(copy_of(pangu[0], tmp_path, weights), seed=0)
    assert str(caught.value).startswith(f"model.path={tmp_path}: {said}") and "\n" not in str(caught.value)


def test_a_pickle_is_not_read(pangu, tmp_path):
    cfg = copy_of(pangu[0], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(random_weights(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded \([^\n]*safetensors[^\n]*$"):
        load_model(cfg, seed=0)


@pytest.mark.parametrize("path", ["FreedomIntelligence/openPangu-Embedded-1B", "/nowhere/at all"])
def test_a_model_that_cannot_be_reached_is_said_in_one_line(path):
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(name="m", source="hub", path=path), seed=0)
    line = str(caught.value)
    assert line.startswith(f"model.path={path}: cannot be loaded (") and "\n" not in line
    assert line.endswith("give a folder or a reachable hub id")


# ------------------------------------------------------------------------------------------------------ from a hub

NAME, OTHER = "Somebody/openPangu", "f" * 40
LOAD = """
import json, sys
sys.modules["sklearn"] = None  # transformers would import it, for seconds
from qat.models.load import load_model
from qat.config import ModelConfig
from qat.errors import UserError
for revision in json.loads(sys.argv[2]):
    try:
        model, tokenizer = load_model(ModelConfig(name="m", source="hub", path=sys.argv[1], revision=revision), 0)
        print(json.dumps([model.lm_head.weight.double().sum().item(), tokenizer("the people").input_ids]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_a_hub_model_is_read_at_one_commit(pangu, loaded, tmp_path):
    """Also where the branch moves on while it is read. An unpinned one names the commit to pin."""
    files = {file.name: file.read_bytes() for file in pangu[0].iterdir()}
    with Hub(NAME, files) as hub:
        hub.commits = [OTHER, COMMIT]

        def moves_on(request):
            if request.path.endswith("model.safetensors") and hub.commits[-1] != OTHER:
                hub.commits.append(OTHER)

        hub.fault = moves_on
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", LOAD, NAME, json.dumps([None, COMMIT, "0" * 40])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
        asked = {request.path for request in hub.requests if request.sent}
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    assert lines[0].startswith(f"warning: model.revision is not pinned, and {NAME} may change under its name: ")
    assert lines[0].endswith(f"set model.revision={COMMIT}")
    sound = [loaded[0].lm_head.weight.double().sum().item(), loaded[1]("the people").input_ids]
    assert [json.loads(line) for line in lines[1:3]] == [sound, sound]
    assert f"model.path={NAME}: cannot be loaded" in lines[3]
    assert f"/{NAME}/resolve/{COMMIT}/model.safetensors" in asked and not any(OTHER in path for path in asked)
    assert not any(path.endswith(".py") for path in asked)
