"""Other families: what Hugging Face trains, convert and train quantized, or are refused in one line."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qat.config import ModelConfig
from qat.errors import UserError
from qat.models import tokenizer
from qat.models.load import attend_causally, check_model, load_model
from qat.quant.convert import convert
from qat.train.step import Trainer
from tests.helpers.models import write_model

SIZES = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.2}
GATED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
QKV = {f"self_attn.{which}_proj" for which in "qkv"}
FAMILIES = {  # model_type -> (sizes of its own, linears of the scope mlp.*)
    "llama": ({}, GATED),
    "mistral": ({"sliding_window": 16}, GATED),
    "qwen3": ({"head_dim": 16}, GATED),
    "gemma2": ({"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 0.5}, GATED),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 16}, GATED),
    "olmo2": ({}, GATED),
    "phi3": ({}, {"mlp.gate_up_proj", "mlp.down_proj"}),
}


def saved(folder, kind: str, **sizes):
    """A random model of another family as a folder, its weights in BF16."""
    write_model(folder, kind, dtype="bfloat16", **SIZES | sizes)


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_train_quantized(kind, config, tmp_path):
    sizes, mlp = FAMILIES[kind]
    saved(tmp_path / "checkpoint", kind, **sizes)
    attention = QKV if kind != "phi3" else {"self_attn.qkv_proj"}
    words = ("model=hub", f"model.path={tmp_path / 'checkpoint'}", "quant.bf16_blocks=1")
    cfg = config(*words, "quant.scope=[mlp.*,self_attn.*]")
    assert cfg.model.name == "checkpoint"
    model, _ = load_model(cfg.model, seed=0)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32, attn_implementation="eager"
    )
    batch = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(0))
    bank, covered = convert(model, cfg)
    assert set(covered.kinds()) == mlp | attention | {"self_attn.o_proj"} and len(covered.linears) % 2 == 0
    assert set(convert(load_model(cfg.model, seed=0)[0], config(*words))[1].kinds()) == mlp
    trainer = Trainer(model, bank, cfg)
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, reference(batch).logits, rtol=1e-3, atol=1e-3)
    before = [parameter.clone() for parameter in model.parameters()]
    assert all(trainer.step(number, [batch]).finite for number in (1, 2))
    assert all(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    bank.freeze()
    with torch.no_grad():
        assert model.eval()(batch).logits.isfinite().all()


def test_training_keeps_the_softcapping_of_attention(tmp_path):
    sizes = {"head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 3}
    saved(tmp_path, "gemma2", **sizes, attn_logit_softcapping=0.5)
    model, _ = load_model(ModelConfig(name="m", source="hub", path=str(tmp_path)), seed=0)
    attend_causally(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *((kind, sizes) for kind, (sizes, _) in FAMILIES.items()),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
        ("gpt_neox", {}),
        ("bloom", {}),
        ("falcon", {}),
        ("mixtral", {"num_local_experts": 2}),
        ("bert", {"is_decoder": True}),
    ],
)
def test_other_families_pass_the_check_before_training(kind, sizes, tmp_path):
    saved(tmp_path, kind, **sizes)
    (tmp_path / "model.safetensors").unlink()
    model, _ = check_model(ModelConfig(name="m", source="hub", path=str(tmp_path)), length=128)
    assert model.config.model_type == kind


@pytest.mark.parametrize(
    ("kind", "sizes", "fault"),
    [
        ("bert", {}, "BertLMHeadModel reads text in both directions; give a causal language model"),
        ("roberta", {}, "RobertaForCausalLM reads text in both directions"),
        ("t5", {}, "makes no causal language model (Unrecognized configuration class"),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}, "max_position_embeddings=128 is too few for sequences of"),
        ("gpt2", {}, "max_position_embeddings=128 is too few for sequences of"),
        ("llama", {"num_key_value_heads": 3}, "makes no causal language model (RuntimeError: "),
    ],
)
def test_the_check_before_training_names_what_is_wrong(kind, sizes, fault, tmp_path):
    AutoConfig.for_model(kind, **SIZES | sizes).save_pretrained(tmp_path)
    tokenizer.byte_tokenizer().save_pretrained(tmp_path)
    length = 129 if "too few" in fault else 128
    with pytest.raises(UserError) as caught:
        check_model(ModelConfig(name="m", source="hub", path=str(tmp_path)), length)
    assert str(caught.value).startswith(f"model.path={tmp_path}: {fault}") and "\n" not in str(caught.value)


def test_blocks_of_an_unknown_name_are_said_in_one_line(config, tmp_path):
    saved(tmp_path, "bert", is_decoder=True)
    cfg = config("model=hub", f"model.path={tmp_path}", "model.name=bert")
    with pytest.raises(
        UserError, match=r"^model\.name=bert: has no linears in blocks named layers, h or blocks; give "
    ):
        convert(load_model(cfg.model, seed=0)[0], cfg)


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("gpt2", SIZES, "the blocks of GPT2LMHeadModel have no nn.Linear that could be quantized; give another model"),
        ("gemma3", {"text_config": SIZES | {"head_dim": 8}, "vision_config": VISION}, "Gemma3ForConditionalGeneration"),
        (
            "llama",
            SIZES | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "cannot be loaded (its weights",
        ),
    ],
)
def test_a_family_that_cannot_be_used_is_said_in_one_line(kind, sizes, said, tmp_path):
    config = AutoConfig.for_model(kind, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    tokenizer.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(name="m", source="hub", path=str(tmp_path)), seed=0)
    assert str(caught.value).startswith(f"model.path={tmp_path}: {said}") and "\n" not in str(caught.value)


def test_a_scope_that_a_family_lacks_says_what_there_is(config, tmp_path):
    saved(tmp_path, "opt", word_embed_proj_dim=32, ffn_dim=64)
    cfg = config("model=hub", f"model.path={tmp_path}", "model.name=opt")
    with pytest.raises(UserError, match=r"^quant\.scope=mlp\.\*: matches no linear of opt; choose one of fc1, fc2, "):
        convert(load_model(cfg.model, seed=0)[0], cfg)
