"""Where damage sits, in measurements that are invented: what was planted is found, with its noise and its order."""

from __future__ import annotations

import numpy as np
import pytest

from qat.analysis import sensitivity as analysis

DOCUMENTS = 40
HARM = {"4/weight": 0.03, "6/weight": 0.008, "6/activation": 0.004}  # nats; all other groups do nothing
GROUPS = [f"{block}/{role}" for block in range(3, 8) for role in ("weight", "activation")]


def content(harm=HARM, noise=0.002) -> dict:
    """Two texts of 20 documents in units of four sequences, and 12 questions whose right letter becomes likelier."""
    rng, texts = np.random.default_rng(0), {"speeches": {}, "articles": {}}
    for number in range(DOCUMENTS // 4):
        base = 3 + rng.random(4)

        def values(loss, kl, base=base):
            return {"loss": (base + loss + rng.normal(0, noise, 4)).tolist(), "kl": [kl] * 4}

        whole = sum(harm.values())
        unit = {"documents": [4 * number + i for i in range(4)]}
        unit |= {"unquantized": {"loss": base.tolist(), "kl": [0.0] * 4}, "quantized": values(whole, whole)}
        unit["alone"] = {group: values(harm.get(group, 0), harm.get(group, 0)) for group in GROUPS}
        left = {group: whole - harm.get(group, 0) for group in GROUPS}
        unit["left_out"] = {group: values(loss, loss) for group, loss in left.items()}
        texts[list(texts)[number % 2]][str(number)] = unit
    asked = {}
    for number in range(12):
        plain = np.log([0.1, 0.2, 0.1, 0.1])

        def letters(shift, plain=plain):
            return {"logprobs": (plain + shift).tolist()}

        unit = {"targets": [1], "unquantized": letters(0), "quantized": letters(0.5)}
        unit["alone"] = {group: letters(0.5 if group == "4/weight" else 0.0) for group in GROUPS}
        unit["left_out"] = {group: letters(0.0 if group == "4/weight" else 0.5) for group in GROUPS}
        asked[str(number)] = unit
    return {"measured": {"block": {**texts, "mmlu": asked}}}


def rows(measure, way, **more):
    return {row["group"]: row for row in analysis.rows(content(**more), "block", measure, way)}


@pytest.mark.parametrize("way", analysis.WAYS)
def test_harm_that_was_planted_is_found_either_way(way):
    found = rows("loss", way)
    assert list(found) == GROUPS
    for group, row in found.items():
        assert row["n"] == DOCUMENTS and row["ci"][0] < row["difference"] < row["ci"][1]
        assert row["difference"] == pytest.approx(HARM.get(group, 0), abs=0.002)
    assert {group for group, row in found.items() if row["p_holm"] < 0.05} == set(HARM)
    assert all(row["p_holm"] >= row["p_value"] for row in found.values())
    assert found["4/weight"]["decision"] == "harm" and found["3/weight"]["decision"] == "equivalent"


def test_weights_are_compared_with_activations_document_by_document():
    roles = content({"4/weight": 0.03, "4/activation": 0.01})["measured"]["block"]
    for unit in (unit for units in roles.values() for unit in units.values()):
        unit["alone"] = {role: unit["alone"][f"4/{role}"] for role in ("weight", "activation")}
    row = analysis.between_roles({"measured": {"role": roles}}, "loss")
    assert row["difference"] == pytest.approx(0.02, abs=0.002) and row["ci"][0] > 0.015 and row["n"] == DOCUMENTS
    assert analysis.between_roles({"measured": {"role": roles}}, "logprob")["difference"] == pytest.approx(0.5)


def test_noise_alone_is_marked_nowhere():
    found = rows("loss", "alone", harm={}, noise=0.01)
    assert min(row["p_holm"] for row in found.values()) > 0.05


def test_a_document_in_two_units_counts_once():
    twice = content()
    units = twice["measured"]["block"]["speeches"]
    for unit in units.values():
        unit["documents"] = [0, 0, 1, 1]
    assert len(analysis.series(twice, "block", "loss", ["quantized"], "speeches")) == 2
    mean = np.mean([unit["unquantized"]["loss"][:2] for unit in units.values()])
    assert analysis.series(twice, "block", "loss", ["unquantized"], "speeches")[0] == pytest.approx(mean)


def test_questions_have_a_shift_that_is_no_knowledge():
    (shift, mass, entropy) = (rows(m, "alone")["4/weight"]["difference"] for m in ("logprob", "mass", "cross_entropy"))
    assert shift == pytest.approx(0.5) and mass == pytest.approx(0.5 * (np.exp(0.5) - 1)) and abs(entropy) < 1e-9
    assert rows("logprob", "left_out")["4/weight"]["difference"] == pytest.approx(0.5)
    assert rows("logprob", "left_out")["6/weight"]["difference"] == pytest.approx(0)
    assert analysis.sources(content(), "block", "logprob") == ["mmlu"]


def test_blocks_are_kept_in_the_order_of_what_they_do():
    measured = content()
    assert list(analysis.order(measured))[:2] == [4, 6]
    assert analysis.order(measured)[6] == pytest.approx(0.012)  # both roles
    assert analysis.first_choices(measured)[:2] == [[4], [4, 6]]
    whole, first = analysis.choices(measured)[:2]
    loss = analysis.total(measured, "block", "loss")["difference"]
    assert whole["expected"] == pytest.approx({"loss": loss, "kl": 0.042}) and whole["blocks"] == []
    assert first["expected"] == pytest.approx({"loss": loss * 0.012 / 0.042, "kl": 0.012}) and first["loss"] is None
    unit = {"documents": [0, 1], "unquantized": {"loss": [3.0, 3.1], "kl": [0.0, 0.0]}}
    unit["quantized"] = {"loss": [3.05, 3.13], "kl": [0.04, 0.05]}
    unit["left_out"] = {"4": {"loss": [3.02, 3.1], "kl": [0.01, 0.02]}}
    measured["measured"]["kept"] = {"speeches": {"a": unit}}
    whole, first, second = analysis.choices(measured)[:3]
    assert whole["loss"]["difference"] == pytest.approx(0.04) and second["loss"] is None
    assert first["loss"]["difference"] == pytest.approx(0.01) and first["kl"]["difference"] == pytest.approx(0.015)


def test_where_nothing_moves_nothing_is_expected_of_a_choice():
    assert {row["expected"]["kl"] for row in analysis.choices(content(harm={}))} == {0.0}


def test_harm_of_a_choice_holds_after_holms_correction():
    """A choice's p is 0.036: harm by itself, and not as one of four."""

    def values(*changes):
        return {"loss": [3 + change for change in changes], "kl": [0.01] * 16}

    unit = {"documents": list(range(16)), "unquantized": values(*[0.0] * 16), "quantized": values(*[0.1, 0.11] * 8)}
    measured = content()
    names = [",".join(map(str, blocks)) for blocks in analysis.first_choices(measured)]
    decisions = []
    for count in (1, 3):
        unit["left_out"] = dict.fromkeys(names[:count], values(*[0.268, -0.068] * 8))
        measured["measured"]["kept"] = {"speeches": {"a": unit}}
        decisions.append([row["loss"]["decision"] for row in analysis.choices(measured) if row["loss"]])
    assert decisions == [["harm"] * 2, ["harm", *["undecided"] * 3]]


def test_ranks_agree_only_where_there_are_ranks():
    measured = content()
    for scores, correlation in (
        ({"4": 5.0, "6": 2.0}, 1.0),
        ({"4": 2.0, "6": 5.0}, -1.0),
        ({"4": 5.0}, None),
        ({"4": 5.0, "6": 5.0}, None),
    ):
        blocks, found = analysis.agreement(measured | {"auto_quantize": scores})
        assert [str(block) for block in blocks] == sorted(scores, key=scores.get, reverse=True)
        assert found == (correlation and pytest.approx(correlation))
