"""The design that decides the claims: which cells it has, what they see, and the page that fills."""

import copy
import itertools
import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from qat.analysis import stats
from qat.analysis.results import Outcomes
from qat.cli.experiments import variant
from qat.errors import ConfigError
from qat.runs.identity import baseline_of, run_id
from qat.studies import decide, measures, page
from qat.studies.audit import PLAIN
from qat.studies.contrasts import OPEN, Response
from tests.conftest import composing
from tests.helpers.planned import planned
from tests.helpers.studies import WORDS, invent, write
from tests.helpers.synthetic_runs import edit

SEEDS = range(8)


@pytest.fixture(scope="module")
def cells():
    words = [word for word in WORDS if not word.startswith("benchmark=")]
    with composing():
        cells, left_out = decide.design([*words, "budget.micro_batch=4", "budget.accumulation=1"], variant, SEEDS)
    assert not left_out
    return cells


def test_every_cell_that_a_claim_needs_is_there_once(cells):
    of = defaultdict(list)
    for cell in cells:
        of[cell.cfg.benchmark.name].append(cell)
    runs = {name: {run_id(cell.cfg) for cell in named} for name, named in of.items()}
    # exp8 is a cell of both studies
    asked = next(name for name in runs if name not in ("text", "passages"))
    assert len(runs["text"]) == 4 * (9 + 6) + 4 * 2
    assert runs[asked] < runs["passages"] < runs["text"]
    assert len(runs[asked]) == 4 and len(runs["passages"]) == 8 * 2 + 4
    assert len({cell.label for cell in cells}) == len(cells)
    assert len({run_id(baseline_of(cell.cfg)) for cell in cells}) == 4 * 4 + 4 * 2
    assert [cell.cfg.benchmark.control for cell in cells] == [cell.cfg.benchmark.name == asked for cell in cells]
    assert {cell.cfg.validation.name for cell in of["passages"]} == {"passages"}
    assert {cell.cfg.validation.name for cell in (*of["text"], *of[asked])} == {"wikipedia"}
    assert all("benchmark=passages" in cell.overrides for cell in of["passages"])


def test_the_recipe_has_all_seeds_before_another_cell_has_one(cells):
    often = [number for number, cell in enumerate(cells) if cell.key in decide.OFTEN]
    assert often[-1] < 8 * 6 + 4 and {cells[number].cfg.seed for number in often} == set(SEEDS)
    assert [cell.cfg.seed for cell in cells[: often[-1] + 1]] == sorted(
        cell.cfg.seed for cell in cells[: often[-1] + 1]
    )
    others = [(cell.cfg.seed, run_id(baseline_of(cell.cfg))) for cell in cells[often[-1] + 2 :]]
    assert len(list(itertools.groupby(others))) <= len(set(others)) + 4  # exp3's passages come after all of a seed


def test_claims_on_other_text_are_judged_on_passages_with_the_answers_of_questions(cells):
    keys = list(dict.fromkeys(cell.key for cell in cells))
    few = invent(keys, range(4))
    judged = {claim["key"]: claim for claim in decide.claims(few, cells[0])}
    lacking = {key for key, claim in judged.items() for each in claim["statements"] if "without" in each}
    assert lacking == {"linears", "labels"}  # too few scopes; of the labels nothing is forgotten
    assert len(judged) == 15 and judged["linears"]["verdict"] == OPEN
    on = [decide.RECIPE, decide.EXP7, ("exp8", PLAIN), decide.EXP3]
    more = invent(on, range(4), damage=lambda *_: 0.05, sequences=80, benchmark="passages")
    more = [replace(m, scored={name: Outcomes(row.losses, {}) for name, row in m.scored.items()}) for m in more]
    both = {claim["key"]: claim for claim in decide.claims([*few, *more], cells[0])}
    assert {key for key in both if both[key] != judged[key]} == set(decide.ON_PASSAGES)
    of_answers = {row["measure"]: row["estimate"] for row in both["sufficient_w8a8"]["statements"]}
    assert of_answers["contrast"] == judged["sufficient_w8a8"]["statements"][-1]["estimate"] is not None
    assert of_answers["other_loss"]["value"] == pytest.approx(0.05, abs=1e-3)
    assert both["sufficient_w8a8"]["verdict"] == "contradicted" != judged["sufficient_w8a8"]["verdict"]


def test_the_benchmark_is_of_the_cells_that_are_asked_and_the_other_text_is_needed():
    with composing():
        cells, left_out = decide.design(["model=tiny", "benchmark=letters", "budget.micro_batch=1"], variant, [0])
        with pytest.raises(ConfigError, match="validation=none: claims are about text of another kind"):
            decide.design(["validation=none"], variant, [0])
        other, _ = decide.design(["model=tiny", "budget.arithmetic=fp32"], variant, [0])
    assert {cell.cfg.benchmark.name for cell in cells} == {"text", "passages", "letters"}
    assert {cell.cfg.budget.arithmetic for cell in other} == {"fp32"}
    assert "budget.micro_batch=2" in left_out["a tick a call"]


def test_what_is_planned_for_the_size_that_was_measured_is_what_was_detectable():
    rng = np.random.default_rng(3)
    seeds, units = rng.normal(0, 0.2, (5, 1)), rng.normal(0, 0.5, (1, 40))
    rows = 1 + seeds + units + rng.normal(0, 1, (5, 40))
    response = Response("x", "", 1, {(("a",), seed): row for seed, row in enumerate(rows)}, "documents")
    same = planned(response, {("a",): 1}, 0.95, 5, 40)
    assert same == pytest.approx(stats.crossed(rows).detectable(0.95), rel=1e-6)
    assert planned(response, {("a",): 1}, 0.95, 20, 160) < same / 2
    assert planned(response, {("a",): 1, ("b",): 1}, 0.95, 5, 40) is None


def test_simulated_differences_of_the_planned_size_are_found_in_four_of_five_cases():
    """Plan from a large pilot, run with 6 seeds and 30 units."""
    rng = np.random.default_rng(5)

    def draw(seeds: int, units: int) -> np.ndarray:
        return rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, 1, (1, units)) + rng.normal(0, 1, (seeds, units))

    pilot = Response("x", "", 1, {(("a",), seed): row for seed, row in enumerate(draw(200, 200))}, "documents")
    size = planned(pilot, {("a",): 1}, 0.95, 6, 30)
    found = [stats.crossed(size + draw(6, 30)).interval()[0] > 0 for _ in range(1000)]
    assert 0.75 < np.mean(found) < 0.85


def test_the_table_fills_as_runs_finish(cells, tmp_path):
    made = [copy.deepcopy(cell) for cell in cells if cell.cfg.seed < 2]
    for cell in made:
        cell.cfg.runs_dir = str(tmp_path)
        if cell.cfg.benchmark.name != "passages":
            cell.cfg.benchmark.name = "quick"  # as `write` calls it
    recipe = (decide.RECIPE, ("exp8", PLAIN))
    first = [cell for cell in made if cell.key in recipe and cell.cfg.benchmark.name == "quick"]
    write(first, invent([decide.RECIPE] * len(first), damage=lambda key, _: 0.05))
    for path in tmp_path.glob("*/eval.json"):
        edit(path, _on_passages)
    measured, missing = measures.read(made)
    assert [name for name in missing if "passages" in name and not name.startswith(("max w64, 1e-4", "exp3"))] == []
    assert {m.benchmark for m in measured} == {"quick", "passages"}
    judged = decide.claims(measured, made[0])
    path = page.write_decide(measured, missing, judged, made[0].cfg, tmp_path / "out")
    text = path.read_text()
    verdicts = {claim["key"]: claim["verdict"] for claim in judged}
    assert verdicts["sufficient_w8a8"] == "contradicted" and verdicts["best"] == OPEN
    assert "- most_recent, 1e-5, 5 %, quick alone, seeds 0, 1: not begun\n" in text.partition("## Not measured yet")[2]
    assert text.startswith("# The paper's claims, decided\n\n**Of 15 claims: 10 not measured yet, 3 contradicted, ")
    assert "**Provisional: " in text and "## Controls" not in text
    assert "- Benchmark: passages: 16 documents of embedded, 16 of passages, 0 questions; quick: 16 documents" in text
    for m in measured:
        m.scored = m.scored | {"control": m.scored["w8a8"]}
    text = page.write_decide(measured, missing, judged, made[0].cfg, tmp_path / "out").read_text()
    control, w8a8 = (line.split("|")[2:] for line in text.splitlines() if re.match(r"\| (4-bit weights|W8A8) ", line))
    assert control == w8a8, w8a8
    assert all(re.search(r"\d\], finds \d", cell) for cell in (*w8a8[:2], w8a8[3])), w8a8


def _on_passages(results: dict) -> None:
    """Add that the same was scored on passages instead of Wikipedia, and asked nothing."""
    results["passages"] = {
        mode: row
        | {"tasks": {}, "heldout": {"embedded": row["heldout"]["embedded"], "passages": row["heldout"]["wikipedia"]}}
        for mode, row in results["quick"].items()
    }
