"""The design that decides the claims: which cells it has, what they see, and the page that fills."""

import copy
import itertools

import numpy as np
import pytest

from qat.analysis import stats
from qat.cli.experiments import variant
from qat.errors import ConfigError
from qat.runs.identity import baseline_of, run_id
from qat.studies import decide, measures, page
from qat.studies.audit import PLAIN
from qat.studies.contrasts import OPEN, Response
from tests.conftest import composing
from tests.helpers.studies import WORDS, invent, write

SEEDS = range(8)


@pytest.fixture(scope="module")
def cells():
    words = [word for word in WORDS if not word.startswith("benchmark=")]
    with composing():
        cells, left_out = decide.design([*words, "budget.micro_batch=4", "budget.accumulation=1"], variant, SEEDS)
    assert not left_out
    return cells


def test_every_cell_that_a_claim_needs_is_there_once(cells):
    text = [cell for cell in cells if not cell.cfg.benchmark.tasks]
    asked = [cell for cell in cells if cell.cfg.benchmark.tasks]
    # exp8 is a cell of both studies
    assert len({run_id(cell.cfg) for cell in text}) == 4 * (9 + 6) + 4 * 2
    assert {run_id(cell.cfg) for cell in asked} < {run_id(cell.cfg) for cell in text} and len(asked) == 4
    assert len({cell.label for cell in cells}) == len(cells)
    assert len({run_id(baseline_of(cell.cfg)) for cell in text}) == 4 * 4 + 4 * 2
    assert all(cell.cfg.benchmark.control for cell in asked)
    # A record keeps no weights to compare with or to ask later.
    order = [(cell.cfg.seed, cell.key, bool(cell.cfg.benchmark.tasks)) for cell in cells]
    assert order == sorted(order, key=lambda place: place[0])
    for seed in range(decide.FEW):
        mine = [place for place in order if place[0] == seed]
        assert mine[:2] == [(seed, decide.RECIPE, False), (seed, decide.RECIPE, True)]
    baselines = [baseline for baseline, _ in itertools.groupby(run_id(baseline_of(cell.cfg)) for cell in cells)]
    assert len(baselines) == len(set(baselines))
    measured = invent([cell.key for cell in text if cell.cfg.seed == 0], range(4))
    judged = decide.claims(measured, cells[0])
    lacking = {claim["key"] for claim in judged for each in claim["statements"] if "without" in each}
    assert lacking == {"linears", "labels"}  # too few scopes; of the labels nothing is forgotten
    assert len(judged) == 15 and {claim["key"]: claim["verdict"] for claim in judged}["linears"] == OPEN


def test_the_benchmark_is_of_the_cells_that_are_asked_and_the_other_text_is_needed():
    with composing():
        cells, left_out = decide.design(["model=tiny", "benchmark=letters", "budget.micro_batch=1"], variant, [0])
        with pytest.raises(ConfigError, match="validation=none: claims are about text of another kind"):
            decide.design(["validation=none"], variant, [0])
        other, _ = decide.design(["model=tiny", "budget.arithmetic=fp32"], variant, [0])
    assert {cell.cfg.benchmark.name for cell in cells} == {"text", "letters"}
    assert {cell.cfg.budget.arithmetic for cell in other} == {"fp32"}
    assert "budget.micro_batch=2" in left_out["a tick a call"]


def test_what_is_planned_for_the_size_that_was_measured_is_what_was_detectable():
    rng = np.random.default_rng(3)
    seeds, units = rng.normal(0, 0.2, (5, 1)), rng.normal(0, 0.5, (1, 40))
    rows = 1 + seeds + units + rng.normal(0, 1, (5, 40))
    response = Response("x", "", 1, {(("a",), seed): row for seed, row in enumerate(rows)}, "documents")
    planned = decide.planned(response, {("a",): 1}, 0.95, 5, 40)
    assert planned == pytest.approx(stats.crossed(rows).detectable(0.95), rel=1e-6)
    assert decide.planned(response, {("a",): 1}, 0.95, 20, 160) < planned / 2
    assert decide.planned(response, {("a",): 1, ("b",): 1}, 0.95, 5, 40) is None


def test_simulated_differences_of_the_planned_size_are_found_in_four_of_five_cases():
    """Plan from a large pilot, run with 6 seeds and 30 units."""
    rng = np.random.default_rng(5)

    def draw(seeds: int, units: int) -> np.ndarray:
        return rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, 1, (1, units)) + rng.normal(0, 1, (seeds, units))

    pilot = Response("x", "", 1, {(("a",), seed): row for seed, row in enumerate(draw(200, 200))}, "documents")
    size = decide.planned(pilot, {("a",): 1}, 0.95, 6, 30)
    found = [stats.crossed(size + draw(6, 30)).interval()[0] > 0 for _ in range(1000)]
    assert 0.75 < np.mean(found) < 0.85


def test_the_table_fills_as_runs_finish(cells, tmp_path):
    made = [copy.deepcopy(cell) for cell in cells if cell.cfg.seed < 2]
    for cell in made:
        cell.cfg.runs_dir, cell.cfg.benchmark.name = str(tmp_path), "quick"  # as `write` calls it
    first = [cell for cell in made if cell.key in (decide.RECIPE, ("exp8", PLAIN))]
    write(first, invent([decide.RECIPE] * len(first), damage=lambda key, _: 0.05))
    measured, missing = measures.read(made)
    judged = decide.claims(measured, made[0])
    path = page.write_decide(measured, missing, judged, made[0].cfg, tmp_path / "out")
    text = path.read_text()
    verdicts = {claim["key"]: claim["verdict"] for claim in judged}
    assert verdicts["sufficient_w8a8"] == "contradicted" and verdicts["best"] == OPEN
    assert "- most_recent, 1e-5, 5 %, text alone, seeds 0, 1: not begun\n" in text.partition("## Not measured yet")[2]
    assert text.startswith("# The paper's claims, decided\n\n**Of 15 claims: 10 not measured yet, 3 contradicted, ")
    assert "**Provisional: " in text
