"""Turn documents into tokens, in background threads."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from qat.errors import UserError, first_line
from qat.models.tokenizer import document_token

_GROUP = 64  # documents a call of the tokenizer
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def encode(tokenizer, documents: Iterable[str], separator: int) -> list[list[int]]:
    """Return the token ids of each document, after one separator. Errors: UserError when the tokenizer fails."""
    try:
        encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the tokenizer fails on a document ({first_line(error)}); change the text, or the model"
        ) from error
    return [[separator, *ids] for ids in encoded["input_ids"]]


def encode_all(tokenizer, documents: list[str], threads: int) -> Iterator[list[int]]:
    """Yield the token ids of each document (see `encode`), computed a little ahead in background threads."""
    work = functools.partial(encode, tokenizer, separator=document_token(tokenizer))
    for _, tokens in in_background(work, groups(documents), threads, threads):
        yield from tokens.result()


def groups(documents: list[str]) -> Iterator[list[str]]:
    """Split documents into groups for one call of the tokenizer, whose results take a hundred times their memory."""
    return (documents[start : start + _GROUP] for start in range(0, len(documents), _GROUP))


def in_background(
    work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int, ahead: int
) -> Iterator[tuple[_Item, Future[_Result]]]:
    """Yield (item, future of work(item)) in the order of the items, while work on the next `ahead` goes on."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    waiting: deque[tuple[_Item, Future]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:  # do not wait: the garbage collector may end this generator in one of the pool's own threads
        pool.shutdown(wait=False, cancel_futures=True)
