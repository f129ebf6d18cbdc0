"""Tokenizers: openPangu's SentencePiece, single bytes for random models, and the token between documents."""

from __future__ import annotations

import functools
from pathlib import Path

from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from qat.errors import UserError


def document_token(tokenizer) -> int:
    """Return the token to put before every document: the BOS, else `<|endoftext|>` or the EOS.

    SmolLM2's GGUF names `<|im_start|>` as its BOS, but the model was trained with `<|endoftext|>` between documents.
    """
    vocabulary, bos = tokenizer.get_vocab(), tokenizer.bos_token_id
    if bos is not None and bos != vocabulary.get("<|im_start|>"):
        return bos
    for token in (vocabulary.get("<|endoftext|>"), bos, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(
        "the tokenizer has no BOS, EOS or <|endoftext|> token to separate documents with; name one as bos_token in its "
        "tokenizer_config.json"
    )


def load_tokenizer(folder: Path | str, pangu: bool, kwargs: dict):
    """Load the tokenizer of a folder or hub id."""
    # AutoTokenizer insists on openPangu's remote class, which only wraps a SentencePiece model.
    tokenizer = (SentencePiece if pangu else AutoTokenizer).from_pretrained(folder, trust_remote_code=False, **kwargs)
    tokenizer.encode("")  # some faults in its files show only in use
    return tokenizer


class SentencePiece(SentencePieceBackend):
    """The tokenizer of a `tokenizer.model` file, run by SentencePiece. Text that spells a control token stays text.

    transformers' LlamaTokenizer converts such a file to byte-pair encoding and ignores its rules for normalization,
    spaces and user-defined symbols: for many files it gives other tokens.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  where transformers looks for it

    def __init__(self, add_bos_token: bool = True, **kwargs):
        # legacy: otherwise the base class overrules the file's rule for a leading space.
        pattern = "bos" if add_bos_token else None
        super().__init__(add_bos_token=add_bos_token, **kwargs | {"legacy": True, "special_tokens_pattern": pattern})

    def tokenize(self, text: str, **_) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def convert_tokens_to_ids(self, tokens):
        """Do as the base class, but several times faster: that looks up Python properties for every token."""
        if isinstance(tokens, str):
            return super().convert_tokens_to_ids(tokens)
        unknown = self.unk_token_id
        return [self._ids.get(token, unknown) for token in tokens]

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return self.get_vocab()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode(tokens)


REGISTERED_TOKENIZER_CLASSES[SentencePiece.__name__] = SentencePiece  # so that AutoTokenizer loads what we have saved


def byte_tokenizer():
    """Return a tokenizer without training: 256 bytes and `<|endoftext|>` (id 256). For random models and tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<|endoftext|>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
