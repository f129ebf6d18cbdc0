"""Score continuations, and encode what their sequences share once.

The choices of a question share its prompt, and all questions of an MMLU subject share its examples. Sequences are
sorted, so that neighbours share their longest prefixes, and packed: a pack is the tree of its sequences, flattened
depth first, in which a token attends to its ancestors and itself, and has its depth as its position. What the next
pack begins with, too, stays in the key-value cache. Nothing is padded.

A token's result must not depend on what stands beside it, as it does under `current` scaling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import DynamicCache

from qat.models.load import has_full_attention
from qat.models.loss import has_plain_head

_TOKENS = {"cpu": 512, "cuda": 4096}  # of a pack: with more, attention is spent on what is masked; with fewer, products


def shareable(model: nn.Module) -> bool:
    """Return whether a Hugging Face model takes the masks of packs, as known families do with PyTorch's attention."""
    config = model.config
    return has_plain_head(model) and config._attn_implementation == "sdpa" and has_full_attention(config)


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module, requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> Iterator[tuple[int, float, bool]]:
    """Yield (place, log-probability of the continuation, whether every token of it is the likeliest) of each request.

    requests: (tokens of the context, tokens of the continuation), neither empty. A sequence of more than
    `max_length + 1` tokens loses its beginning, as in lm-eval. The order is that of the packs.
    """
    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)
    for pack in packs(requests, max_length, _TOKENS.get(device.type, 512)):
        _crop(cache, pack.cached)
        logits = model(
            input_ids=torch.tensor([pack.tokens], device=device),
            position_ids=torch.tensor([pack.depths], device=device),
            attention_mask=pack.mask(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([node for _, nodes in pack.reads for node in nodes], device=device),
        ).logits[0]
        choices = [requests[place][1] for place, _ in pack.reads]
        labels = torch.tensor([token for choice in choices for token in choice], device=device)
        lengths = [len(choice) for choice in choices]
        logprobs = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0].split(lengths)
        likeliest = (logits.argmax(-1) == labels).split(lengths)
        sums, greedy = (
            torch.stack(rows).tolist() for rows in ([r.sum() for r in logprobs], [r.all() for r in likeliest])
        )
        for (place, _), logprob, is_greedy in zip(pack.reads, sums, greedy, strict=True):
            yield place, logprob, is_greedy


def _crop(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` tokens of the cache."""
    if surplus := cache.get_seq_length() - length:
        cache.crop(-surplus)


class Pack:
    """Build a tree of token sequences, flattened depth first.

    cached: tokens that all sequences begin with and the cache holds, which are no nodes; tokens, depths: of the nodes;
    reads: (place of the sequence, the nodes whose logits predict its continuation). The first sequence's nodes come
    first, so that the cache holds it in one piece afterwards.
    """

    def __init__(self, cached: int):
        self.cached, self.first, self.last = cached, (), ()
        self.tokens, self.depths, self.reads = [], [], []
        self._path: list[int] = []  # nodes of the last sequence

    def add(self, sequence: Sequence[int], place: int, continuation: int) -> None:
        """Add a sequence that sorts behind the last, of which the last `continuation` nodes are read."""
        shared = max(self.cached, common_prefix(self.last, sequence))
        new = range(len(self.tokens), len(self.tokens) + len(sequence) - shared)
        self._path = [*self._path[: shared - self.cached], *new]
        self.tokens += sequence[shared:]
        self.depths += range(shared, len(sequence))
        self.reads.append((place, self._path[-continuation:]))
        self.first, self.last = self.first or sequence, sequence

    def mask(self, device: torch.device) -> torch.Tensor:
        """Return what each node attends to, bool [1, 1, nodes, cached + nodes]."""
        ends, open_nodes = [len(self.tokens)] * len(self.tokens), []
        for node, depth in enumerate(self.depths):
            while open_nodes and self.depths[open_nodes[-1]] >= depth:
                ends[open_nodes.pop()] = node
            open_nodes.append(node)
        node, end = torch.arange(len(ends), device=device), torch.tensor(ends, device=device)
        ancestors = (node <= node[:, None]) & (node[:, None] < end)  # a node's subtree is the range up to its end
        before = torch.ones(len(ends), self.cached, dtype=torch.bool, device=device)
        return torch.cat([before, ancestors], dim=1)[None, None]


def packs(requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, size: int) -> Iterator[Pack]:
    """Yield packs of about `size` tokens, each to be run on the cache that the one before leaves behind.

    A pack is closed where more would be added to it than has to be encoded once more for that.
    """
    sequences = [[*context, *choice][:-1][-max_length:] for context, choice in requests]
    pack = Pack(cached=0)
    for place in sorted(range(len(requests)), key=sequences.__getitem__):
        sequence, continuation = sequences[place], len(requests[place][1])
        read_from = len(sequence) - continuation  # nothing from here on may be in the cache
        shared, stays = common_prefix(pack.last, sequence), common_prefix(pack.first, sequence)
        new = len(sequence) - shared
        full = len(pack.tokens) + new > size and shared - stays < new
        if pack.reads and (full or min(shared, read_from) < pack.cached):
            yield pack
            pack = Pack(cached=min(stays, read_from))
        pack.add(sequence, place, continuation)
    if pack.reads:
        yield pack


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
