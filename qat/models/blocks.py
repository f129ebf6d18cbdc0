"""Run a model from one of its blocks on: what the blocks before it return is known already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


@contextlib.contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Yield a list that receives what each block returns in the pass within this context."""
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def replayed(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Let blocks return what was recorded, and compute nothing, in a pass on the same tokens within this context."""
    for block, output in zip(blocks, outputs, strict=True):
        block.forward = lambda *_, output=output, **__: output
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
