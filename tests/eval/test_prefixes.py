"""Shared prefixes: the same scores as one choice at a time, from fewer tokens."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from qat.eval import prefixes

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 50}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def requests() -> list[tuple[list[int], list[int]]]:
    """Two subjects with their examples, questions of four choices, letters, and a context that is another's prefix."""
    draw = random.Random(0)

    def words(n: int) -> list[int]:
        return [draw.randrange(1, 50) for _ in range(n)]

    pairs = []
    for _ in range(2):
        examples = words(60)
        for _ in range(9):
            question = words(draw.randrange(3, 20))
            pairs += [(examples + question, words(draw.randrange(1, 6))) for _ in range(4)]
            pairs += [(examples + question, [letter]) for letter in range(1, 5)]
        pairs += [(examples, words(4)), (examples[:30], words(2))]
    pairs += [(words(1), words(3)), (words(200), words(70))]
    draw.shuffle(pairs)
    return pairs


def one_by_one(model, context, choice, max_length):
    tokens = (context + choice)[-max_length - 1 :]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0, -len(choice) :].log_softmax(-1)
    picked = logits[torch.arange(len(choice)), choice]
    return picked.sum().item(), bool((logits.argmax(-1) == torch.tensor(choice)).all())


@pytest.mark.parametrize("size", [1, 64, 300, 10_000])
@pytest.mark.parametrize("max_length", [40, 4096])
def test_scores_are_those_of_one_choice_at_a_time(model, monkeypatch, size, max_length):
    monkeypatch.setattr(prefixes, "_TOKENS", {"cpu": size})
    pairs = [(context, choice) for context, choice in requests() if len(choice) <= max_length]
    scored = {place: rest for place, *rest in prefixes.log_likelihoods(model, pairs, max_length)}
    assert sorted(scored) == list(range(len(pairs)))
    for place, (context, choice) in enumerate(pairs):
        logprob, greedy = one_by_one(model, context, choice, max_length)
        assert scored[place][0] == pytest.approx(logprob, rel=1e-5, abs=1e-4)
        assert scored[place][1] == greedy


def test_shared_tokens_are_encoded_once():
    """Packs of a few questions: the examples of a subject stay in the cache, each prompt serves all its choices."""
    pairs = requests()
    packs = list(prefixes.packs(pairs, 4096, 150))
    encoded = sum(len(pack.tokens) for pack in packs)
    sequences = [tuple(context + choice)[:-1] for context, choice in pairs]
    distinct = len({sequence[:end] for sequence in sequences for end in range(1, len(sequence) + 1)})
    plain = sum(map(len, sequences))
    assert distinct <= encoded <= 1.15 * distinct < plain / 5
    assert len(packs) > 3 and any(pack.cached >= 60 for pack in packs)


def test_a_mask_shows_ancestors_only():
    pack = prefixes.Pack(cached=2)
    pack.add([7, 8, 1, 2], place=0, continuation=1)
    pack.add([7, 8, 1, 3], place=1, continuation=1)
    pack.add([7, 8, 4], place=2, continuation=1)
    assert (pack.tokens, pack.depths) == ([1, 2, 3, 4], [2, 3, 3, 2])
    assert pack.reads == [(0, [1]), (1, [2]), (2, [3])]
    assert pack.mask(torch.device("cpu"))[0, 0].int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_models_that_look_at_a_window_are_not_packed(model):
    assert prefixes.shareable(model)
    assert not prefixes.shareable(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    assert prefixes.shareable(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)))
    eager = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    assert not prefixes.shareable(eager)
