"""Measures of answers: by hand, and beside lm-eval's and ai2-olmo-eval's own."""

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch

from qat.analysis.measures import Answers


def answers(logprobs, target, **more) -> Answers:
    rows = [
        {"logprobs": row, "target": t, "choice": int(np.argmax(row)), "correct": int(np.argmax(row) == t)}
        for row, t in zip(logprobs, target, strict=True)
    ]
    for name, values in more.items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    return Answers.of(rows)


def test_measures_by_hand():
    """Two choices whose probabilities are 3 to 1, and a question of three that are alike."""
    own = answers([[math.log(0.3), math.log(0.1)], [-7.0] * 3], [0, 2], bytes=[[4, 9], [1, 1, 8]])
    assert own.measures["cross_entropy"] == pytest.approx([-math.log(0.75), math.log(3)])
    assert own.skill("cross_entropy") == pytest.approx([math.log(2) + math.log(0.75), 0])
    assert own.measures["brier"] == pytest.approx([2 * 0.25**2, (2 / 3) ** 2 + 2 / 9])
    assert own.skill("brier") == pytest.approx([0.5 - 0.125, 0])
    right, wrong = own.bits_per_byte
    assert right == pytest.approx([-math.log2(0.3) / 4, 7 / math.log(2) / 8])
    assert wrong == pytest.approx([-math.log2(0.1) / 9, 7 / math.log(2)])
    assert own.measures["contrast"] == pytest.approx(right - wrong)
    assert own.skill("contrast") == pytest.approx(wrong - right)
    assert own.mass == pytest.approx([0.4, 3 * math.exp(-7)])


def test_a_shift_of_format_changes_the_mass_and_nothing_else():
    """Make all choices twice as likely: what an answer is worth stays, whether it is given in this form does not."""
    before = answers([[-3.0, -4.0, -6.0]], [1])
    after = answers([[-3.0 + math.log(2), -4.0 + math.log(2), -6.0 + math.log(2)]], [1])
    for name, values in before.measures.items():
        assert after.measures[name] == pytest.approx(values)
    assert after.kl(before) == pytest.approx([0], abs=1e-12)
    assert after.mass == pytest.approx(2 * before.mass)


def test_bits_that_all_answers_lose_alike_are_no_contrast():
    before = answers([[-3.0, -4.0, -6.0]], [1], bytes=[[3, 4, 6]])
    after = answers([[-2.7, -3.6, -5.4]], [1], bytes=[[3, 4, 6]])
    assert after.bits_per_byte[0] < before.bits_per_byte[0]
    assert after.measures["contrast"] == pytest.approx(before.measures["contrast"])


def test_flips_count_wrong_answers_too():
    before = answers([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]], [2, 0])
    after = answers([[-2.0, -1.0, -3.0], [-1.0, -2.0, -3.0]], [2, 0])
    assert after.flips(before).tolist() == [1, 0]
    assert (after.correct - before.correct).tolist() == [0, 0]


def test_kl_by_hand_where_questions_differ_in_choices():
    before = answers([[math.log(0.5), math.log(0.5)], [0.0, 0.0, 0.0]], [0, 0])
    after = answers([[math.log(0.75), math.log(0.25)], [0.0, 0.0, 0.0]], [0, 0])
    assert after.kl(before) == pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0])


def test_one_choice_is_a_continuation():
    """Measure a text's last word, which has no other choices, by right or wrong and its bits."""
    own = answers([[-2.0], [-1.0]], [0, 0], bytes=[[5], [3]])
    assert set(own.measures) == {"accuracy", "bits_per_byte"} and not own.constant


def test_without_bytes_there_are_no_bits_per_byte():
    assert set(answers([[-1.0, -2.0]], [0]).measures) == {"accuracy", "cross_entropy", "brier"}


@pytest.mark.parametrize(("rows", "constant"), [([[-1, -2], [-1, -3]], True), ([[-1, -2], [-3, -1]], False)])
def test_constant_answers_are_told(rows, constant):
    assert answers(rows, [0, 1]).constant == constant


def test_brier_is_lm_evals():
    from lm_eval.api.metrics import brier_score

    rng = np.random.default_rng(0)
    logprobs, target = rng.normal(-5, 2, (40, 4)), rng.integers(0, 4, 40)
    shares = np.exp(logprobs) / np.exp(logprobs).sum(1, keepdims=True)
    own = answers(logprobs.tolist(), target.tolist())
    assert own.measures["brier"].mean() == pytest.approx(brier_score(list(zip(target, shares, strict=True))))


def test_bits_per_byte_are_ai2_olmo_evals(monkeypatch):
    """Its metric reads logits; its base class, of a package that is not installed, only adds up."""

    class Metric(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()

        def add_state(self, name, default, **_):
            setattr(self, name, default)

    package = importlib.util.find_spec("olmo_eval").submodule_search_locations
    for name, content in {
        "torchmetrics": {"Metric": Metric},
        "olmo_eval": {"__path__": package},
        "olmo_eval.util": {"all_gather_object": lambda x: [x]},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    from olmo_eval.metrics import ICLMetric

    torch.manual_seed(0)
    answer = " café au lait"
    logits, tokens = torch.randn(1, 9, 11), torch.randint(0, 11, (3,))
    batch = {"doc_id": [0], "cont_id": [0], "continuation": tokens[None], "cont_len": torch.tensor([3])}
    batch |= {"ctx_len": torch.tensor([5]), "dc_len": torch.tensor([1]), "label_id": [0]}
    batch |= {"cont_str_len": torch.tensor([len(answer)]), "cont_byte_len": torch.tensor([len(answer.encode())])}
    batch |= {"cont_str_len_no_leading_space": batch["cont_str_len"] - 1}
    batch |= {"cont_byte_len_no_leading_space": batch["cont_byte_len"] - 1}
    metric = ICLMetric("bpb")
    metric.update(batch, logits)
    logprob = float(logits[0, 4:7].log_softmax(-1).gather(1, tokens[:, None]).sum())
    own = answers([[logprob]], [0], bytes=[[len(answer.encode())]])
    assert own.measures["bits_per_byte"][0] == pytest.approx(float(metric.bpbs[0][2]), rel=1e-5)
