"""Questions out of the packages: complete, the same as the hub's, and made again where the cache is damaged."""

from __future__ import annotations

import pytest

from qat.eval import questions


@pytest.mark.parametrize(
    ("task", "subset", "test", "validation"),
    [("arc_easy", "ARC-Easy", 2376, 570), ("arc_challenge", "ARC-Challenge", 1172, 299)],
)
def test_arc_is_rebuilt_faithfully(task, subset, test, validation):
    """Compare the hub's table with the requests where the package holds both, and its two forms of requests."""
    splits, evaluated, pool = questions.splits(task, subset, "test")
    assert (evaluated, pool) == ("test", "validation")
    assert (len(splits["test"]), len(splits["validation"])) == (test, validation)
    for ours, hub in zip(questions._arc_rows(task, "val_rc_5shot"), splits["validation"], strict=True):
        assert (ours["id"], ours["question"], ours["choices"]["text"]) == (
            hub["id"],
            hub["question"],
            hub["choices"]["text"],
        )
        assert "ABCDE".index(ours["answerKey"]) == hub["choices"]["label"].index(hub["answerKey"])
    in_prompt = [(row["question"], row["answerKey"]) for row in questions._arc_rows(task, "test_mc_5shot")]
    assert in_prompt == [
        (
            "".join(
                [
                    row["question"],
                    *(f"\n {x}. {y}" for x, y in zip(row["choices"]["label"], row["choices"]["text"], strict=True)),
                ]
            ),
            row["answerKey"],
        )
        for row in splits["test"]
    ]


@pytest.mark.parametrize("content", ["", "[]", '[{"id": "1", "question'])
def test_questions_of_the_cache_that_are_cut_are_made_again(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv("HIF8_CACHE", str(tmp_path))
    whole = questions.splits("arc_easy", "ARC-Easy", "test")[0]["test"]
    (file,) = tmp_path.glob("arc_*.json")
    file.write_text(content)
    again = questions.splits("arc_easy", "ARC-Easy", "test")[0]["test"]
    assert again.to_list() == whole.to_list()
    assert capsys.readouterr().out == f"warning: {file} is damaged and made again\n"
    assert questions.splits("arc_easy", "ARC-Easy", "test")[0]["test"].to_list() == whole.to_list()
    assert capsys.readouterr().out == ""


def test_selection_is_spread_over_the_split():
    assert list(questions.spread(5, None)) == list(questions.spread(5, 9)) == [0, 1, 2, 3, 4]
    assert questions.spread(100, 1) == [50]
    assert questions.spread(10, 5) == [1, 3, 5, 7, 9]
    chosen = questions.splits("hellaswag", None, "test")[0]["validation"].select(questions.spread(10042, 20))
    assert {source.split("~")[0] for source in chosen["source_id"]} == {"activitynet", "wikihow"}
