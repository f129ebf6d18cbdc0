"""How a question and its answers become tokens, whatever a tokenizer adds to them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qat.config import ModelConfig
from qat.eval.language_model import LanguageModel
from qat.models.load import check_model
from qat.models.tokenizer import byte_tokenizer
from tests.conftest import composed
from tests.eval.test_benchmarks import SMALL, prompts, run

END = "<|endoftext|>"


def awkward(merges=(), added="$A", named=True):
    """A token a byte, save for `merges`; `added` is what the tokenizer makes of a text, as "$A <|endoftext|>"."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), END]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    ends = [(END, len(words) - 1)]
    backend.post_processor = processors.TemplateProcessing(single=added, special_tokens=ends)
    names = {"bos_token": END, "eos_token": END, "pad_token": END} if named else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def pair(model, tokenizer, prompt, answer):
    """Encode a prompt and an answer."""
    lm = LanguageModel(model, tokenizer, 1, 2048)
    return tuple(map(tokenizer.convert_ids_to_tokens, lm._encode_pair(prompt, answer)))


@pytest.mark.parametrize("changed", [{"added": f"$A {END}"}, {"named": False}])
def test_what_a_tokenizer_adds_behind_or_does_not_name_changes_no_score(model, changed):
    tasks = {"arc_challenge": SMALL["arc_challenge"]}
    assert run(model, awkward(**changed), tasks) == run(model, awkward(), tasks)


@pytest.mark.parametrize(
    ("merges", "added", "expected"),
    [
        ((), "$A", (["Q", ":"], ["Ġ", "A"])),
        ((), f"$A {END}", (["Q", ":"], ["Ġ", "A"])),
        ((), f"{END} $A {END} {END}", ([END, "Q", ":"], ["Ġ", "A"])),
        ([("Ġ", "A")], f"{END} $A", ([END, "Q", ":"], ["ĠA"])),
        ([("Ġ", "A"), (":", "ĠA")], f"{END} $A {END}", ([END, "Q", ":"], ["ĠA"])),  # nothing would be left
        ([(":", "Ġ")], "$A", (["Q", ":"], ["Ġ", "A"])),  # the space would be lost
    ],
)
def test_an_answer_is_encoded_whole_and_nothing_is_added_to_it(model, merges, added, expected):
    assert pair(model, awkward(merges, added), "Q:", " A") == expected
    assert pair(model, awkward(merges, added), "Q: ", "A") == expected


@pytest.mark.parametrize("name", ["byte", "smollm2_135m"])
def test_tokens_are_those_of_lm_eval_where_its_way_works(model, name, user_cache):
    from lm_eval.models.huggingface import HFLM

    config = ModelConfig(**composed(f"model={name}").model) if name != "byte" else None
    tokenizer = check_model(config, length=128)[1] if config else byte_tokenizer()
    ours = LanguageModel(model, tokenizer, 1, 2048)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)
    pairs = [args for task in SMALL for args in prompts(task, SMALL[task].shots, SMALL[task].limit)]
    assert len(pairs) > 12
    assert all(ours._encode_pair(*args) == theirs._encode_pair(*args) for args in pairs)
