"""The factorial: which runs it has, planted effects that it finds again, and verdicts that need enough data."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from qat.cli import experiments
from qat.cli.experiments import variant
from qat.config import ScalingConfig
from qat.errors import ConfigError
from qat.quant.scaling import ScaleBank
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.studies import design, factorial, measures, page
from qat.studies.contrasts import CONTRADICTED, EQUIVALENT, OPEN, SUPPORTED
from qat.studies.design import Cell
from tests.conftest import composing
from tests.helpers.studies import WORDS, invent, write

KEYS = list(itertools.product(*factorial.FACTORS.values()))


@pytest.fixture(scope="module")
def grid() -> list[Cell]:
    with composing():
        return factorial.design([*WORDS, "seeds=[0,1]", "report.out=elsewhere"], variant)


def placed(grid, folder) -> list[Cell]:
    """The grid with its runs in `folder`."""
    made = copy.deepcopy(grid)
    for cell in made:
        cell.cfg.runs_dir = str(folder)
    return made


# ---------------------------------------------------------------------------------------------------- design


def test_the_grid_has_each_distinct_run_once(grid):
    assert len(grid) == 20 == len({run_id(cell.cfg) for cell in grid})
    assert {cell.key for cell in grid} == set(KEYS)
    assert len({run_id(baseline_of(cell.cfg)) for cell in grid}) == 2
    recipe = next(cell.cfg for cell in grid if cell.key == factorial.RECIPE)
    with composing():
        assert run_id(recipe) == run_id(experiments.jobs_of("exp8", WORDS)[0].cfg)
        composed = [run_id(variant("exp8", cell.overrides[1:], []).cfg) for cell in grid[:3]]
    assert composed == [run_id(cell.cfg) for cell in grid[:3]]
    seeded = design.with_seeds(grid, [0, 1, 2])
    assert len({run_id(cell.cfg) for cell in seeded}) == 60
    assert len({run_id(baseline_of(cell.cfg)) for cell in seeded}) == 6


def test_only_max_reads_its_window_and_of_window_1_it_is_most_recent(grid):
    by_key = {cell.key: cell.cfg for cell in grid}
    for scaling in ("current", "most_recent", "exp_smooth"):
        other = copy.deepcopy(by_key[scaling, "1e-5", "0"])
        other.scaling.window = 16
        assert run_id(other) == run_id(by_key[scaling, "1e-5", "0"])

    def scales(algo: str) -> list[torch.Tensor]:
        cfg = copy.deepcopy(by_key["most_recent", "1e-5", "0"])
        cfg.scaling = ScalingConfig(algo=algo, window=1)
        bank, seen = ScaleBank(["a", "b"], [15.0, 15.0], cfg.scaling), []
        for step, amax in enumerate(torch.rand(9, 2, generator=torch.Generator().manual_seed(0)), start=1):
            bank.begin_step(step, 1)
            torch._foreach_copy_(bank.amaxes, list(amax.split(1)))
            bank.tick()
            seen.append(bank.scale.clone())
        assert bank.quantizing
        return seen

    assert all(torch.equal(a, b) for a, b in zip(scales("max"), scales("most_recent"), strict=True))


@pytest.mark.parametrize("word", ["lr=lr1e-5", "optim.lr=3e-5", "scaling.window=8", "experiment=exp3", "quant=bf16"])
def test_what_the_grid_sets_is_refused_on_the_command_line(word):
    with pytest.raises(ConfigError, match=f"{word}: the factorial sets this itself; leave it out"):
        factorial.design([word], variant)


# -------------------------------------------------------------------------------------------------- analysis


def planted(key, seed=0) -> float:
    """most_recent does 0.03 nats of damage, max w64 0.005; most_recent 0.04 more at lr 1e-4; warmup does nothing."""
    scaling, rate, _ = key
    extra = 0.04 if (scaling, rate) == ("most_recent", "1e-4") else 0
    return {"most_recent": 0.03, "max w64": 0.005}.get(scaling, 0.01) + extra + 0.002 * seed


@pytest.mark.parametrize(("seeds", "noise"), [((0,), 0.002), ((0, 1, 2), 0.0004)])
def test_planted_effects_are_found_within_their_intervals(seeds, noise):
    """Three seeds leave two degrees of freedom, so of them as much is seen in less noise only."""
    measured = invent(KEYS, seeds, damage=planted, noise=noise)
    response = factorial.responses(measured)["heldout w8a8"]
    contrasts = factorial.contrasts()
    assert len(contrasts) == 6 + 9
    truth = {
        "max w64": 0.005 - 0.05,
        "lr 1e-5": -0.04 / 5,
        "warmup": 0,
        "max w64 × lr 1e-5": 0.04,
        "lr 1e-5 × warmup": 0,
    }
    for label, value in truth.items():
        found = response.contrast(contrasts[label], 0.999)
        assert found.low < value < found.high and found.high - found.low < 0.012, label
        by_hand = sum(
            w * np.mean([response.values[key, s].mean() for s in seeds]) for key, w in contrasts[label].items()
        )
        assert found.value == pytest.approx(by_hand)
    assert found.of == ("documents" if len(seeds) == 1 else "seeds")
    rows = {row["effect"]: row for row in factorial.effects(measured)[0]["effects"]}
    assert rows["max w64 × lr 1e-5"]["p_holm"] < 0.001 and rows["lr 1e-5 × warmup"]["p_holm"] > 0.05
    assert orthogonal(measured)["statements"][0]["verdict"] == CONTRADICTED  # 0.04 more at lr 1e-4


def orthogonal(measured) -> dict:
    return next(claim for claim in factorial.claims(measured) if "orthogonal" in claim["claim"])


def forgets(key) -> float:
    return 0.1 if key[1] == "1e-4" else 0.0


def test_no_interaction_is_supported_only_with_enough_data():
    """No interaction is planted; damage and forgetting are."""
    much, little = (
        orthogonal(invent(KEYS, damage=lambda key, _: 0.02, forgotten=forgets, sequences=n, noise=noise))
        for n, noise in ((64, 0.01), (3, 0.05))
    )
    assert much["verdict"] == SUPPORTED and "Of one seed" in much["why"]
    assert little["verdict"] == OPEN


def test_without_damage_or_forgetting_nothing_is_orthogonal():
    claim = orthogonal(invent(KEYS, damage=lambda key, _: 0.02))
    assert {each["verdict"] for each in claim["statements"]} == {SUPPORTED}
    assert claim["verdict"] == OPEN and claim["why"].startswith("It was not seen that BF16 at lr 1e-4 forgets more")


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_papers_claims_are_judged_by_the_marks(seeds):
    """The max window is needed and saves the recipe; the warmup and the other rules do as well; lr 1e-4 forgets 0.1
    nats. Of one seed what is one number a run has no noise, and decides nothing."""
    alone = len(seeds) == 1
    measured = invent(
        KEYS,
        seeds,
        damage=lambda key, _: 0.1 if key[0] == "most_recent" else 0.001,
        ape=lambda key: 0.6 if key[0] == "most_recent" else 0.1,
        overshoot=lambda key: 0.4 if key[0] == "most_recent" else 0.05 + (0.001 if key == factorial.RECIPE else 0),
        forgotten=forgets,
    )
    for number, m in enumerate(measured):
        m.ape, m.overshoot, m.clipped = (
            value * 1.002 ** (7 * number % 11) for value in (m.ape, m.overshoot, m.clipped)
        )
    claims = {claim["claim"]: claim for claim in factorial.claims(measured)}
    verdicts = {name: claim["verdict"] for name, claim in claims.items()}
    assert verdicts["The max window saturates less than scaling by the last amax"] == (OPEN if alone else SUPPORTED)
    assert verdicts["Necessary: the max window"] == SUPPORTED
    best = claims["The max window does less damage than the other scalings"]
    assert [each["verdict"] for each in best["statements"]] == [SUPPORTED, EQUIVALENT, EQUIVALENT]
    assert (
        best["verdict"] == EQUIVALENT and "“max w64 has a lower held-out loss than exp_smooth” is equiv" in best["why"]
    )
    assert best["why"].endswith(
        "too little to count, where 0.0155 would." + " Of one seed: noise between runs is not in it." * alone
    )
    assert verdicts["Necessary: the low learning rate"] == SUPPORTED
    warmup = claims["Necessary: the BF16 warmup"]
    assert [each["verdict"] for each in warmup["statements"]] == [CONTRADICTED, CONTRADICTED]
    sufficient = claims["Sufficient: the recipe meets every threshold (W8A8)"]["statements"]
    assert [each["verdict"] for each in sufficient] == [SUPPORTED, SUPPORTED, OPEN if alone else SUPPORTED, SUPPORTED]
    recipe = [math.log(m.ape) for m in measured if m.key == factorial.RECIPE]
    assert sufficient[2]["estimate"]["value"] == pytest.approx(np.mean(recipe))
    assert (sufficient[2]["estimate"]["low"] is None) == alone
    saturation = claims["The max window saturates less than scaling by the last amax"]
    assert ("points, all of it below 0; so is the other." in saturation["why"]) == (not alone)
    high = claims["Training at lr 1e-4 forgets, at lr 1e-5 it does not"]["statements"][0]
    assert high["verdict"] == SUPPORTED and high["estimate"]["value"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ptq", "damage", "verdict"),
    [
        (0.05, 0.01, SUPPORTED),
        (0.01, 0.0, CONTRADICTED),
        (0.05, 0.08, CONTRADICTED),
        (0.013, -0.05, OPEN),
        (0.05, 0.03, SUPPORTED),
        (0.05, 0.05, EQUIVALENT),
    ],
)
def test_qat_is_needed_where_ptq_misses_the_mark_and_the_recipe_is_better(ptq, damage, verdict):
    """The threshold is 0.5 % of 2.6 nats of other text: 0.013."""
    measured = invent(KEYS, damage=lambda key, _: damage, ptq=lambda key: ptq if key[1] == "1e-5" else 1.0)
    claim = next(claim for claim in factorial.claims(measured) if claim["claim"].startswith("QAT is needed"))
    assert claim["verdict"] == verdict, claim["why"]
    assert claim["statements"][0]["estimate"]["value"] == pytest.approx(ptq, abs=1e-3)


def test_factors_of_the_loss_ape_are_found_over_seeds():
    """most_recent has twice the APE of every other rule, and each seed a factor of its own in every cell."""
    keys = [key for key in KEYS if key[0] in ("most_recent", "max w64")]
    measured = invent(keys, (0, 1, 2), ape=lambda key: 0.4 if key[0] == "most_recent" else 0.2)
    for number, m in enumerate(measured):
        m.ape *= 1.01 ** (number * 5 % 7)
    response = factorial.responses(measured)["ape"]
    effect = {key: (-1) ** (key[0] == "most_recent") / 4 for key in keys}
    found = response.contrast(effect)
    changes = [sum(effect[m.key] * math.log(m.ape) for m in measured if m.seed == seed) for seed in (0, 1, 2)]
    test = stats.ttest_1samp(changes, 0)
    assert (found.low, found.high, found.p) == pytest.approx((*test.confidence_interval(), test.pvalue))
    assert math.exp(found.low) < 0.5 < math.exp(found.high) < 0.7 and found.low < found.high
    alone = factorial.responses([m for m in measured if m.seed == 0])["ape"].contrast(effect)
    assert alone.low is None and alone.p is None


def test_windows_that_no_run_outlasts_are_one_level(grid, tmp_path):
    """max w16 and w64 to the last digit: one test in Holm's correction, one cell in means over the scalings."""
    measured = invent(KEYS, (0, 1, 2), damage=planted, noise=0.002)
    assert factorial.repeated(measured) == ()
    wide = {(m.key[1:], m.seed): m for m in measured if m.key[0] == "max w64"}
    for m in measured:
        if m.key[0] == "max w16":
            m.scored, m.ape = wide[m.key[1:], m.seed].scored, wide[m.key[1:], m.seed].ape
    assert factorial.repeated(measured) == ("max w16",)
    assert factorial.repeated([m for m in measured if m.key != ("max w64", "1e-4", "0")]) == ("max w16",)
    rows = {row["effect"]: row for row in factorial.effects(measured)[0]["effects"]}
    assert rows["max w16"]["estimate"] is rows["max w16 × lr 1e-5"]["estimate"] is rows["max w16"]["p_holm"] is None
    assert rows["lr 1e-5"]["estimate"]["value"] == pytest.approx(-0.04 / 4, abs=0.001)
    tested = [row for row in rows.values() if row["estimate"]]
    smallest = min(tested, key=lambda row: row["estimate"]["p"])
    assert len(tested) == 6 + 9 - 3 and smallest["p_holm"] == pytest.approx(12 * smallest["estimate"]["p"])
    path = page.write_factorial(measured, {}, grid[0].cfg, tmp_path)
    assert "max w16 and max w64 are the same numbers here; effects count them once." in path.read_text()


# ------------------------------------------------------------------------------------------------------ page


def test_folders_are_read_and_the_page_stands_alone(grid, tmp_path):
    """Read a part of the grid, one run of which has failed."""
    wanted = set(itertools.product(("most_recent", "max w64"), factorial.RATES, ("5 %",)))
    made = [cell for cell in placed(grid, tmp_path) if cell.key in wanted]
    written = invent([cell.key for cell in made], damage=planted, lost=lambda key: 4 * forgets(key))
    write(made, written)
    status = Run.of(made[0].cfg).path / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "failed", "reason": "a full disk"}))
    measured, missing = measures.read(made)
    assert list(missing) == [made[0].label]
    for ours, theirs in zip(measured, written[1:], strict=True):
        assert (ours.key, ours.seed, ours.run, ours.baseline, ours.linears) == (
            theirs.key, theirs.seed, theirs.run, theirs.baseline, theirs.linears,
        )  # fmt: skip
        assert [ours.ape, ours.overshoot, ours.clipped] == pytest.approx([theirs.ape, theirs.overshoot, theirs.clipped])
        for scored in theirs.scored:
            assert ours.losses(scored) == pytest.approx(theirs.losses(scored))
            assert np.array_equal(ours.answers(scored), theirs.answers(scored))
    path = page.write_factorial(measured, missing, made[-1].cfg, tmp_path / "out")
    text, kept = path.read_text(), json.loads((tmp_path / "out" / "factorial.json").read_text())
    assert f"- {made[0].label}: {Run.of(made[0].cfg).id} is failed at step 12 of 12 (a full disk)" in text
    assert "PTQ less baseline" in text and all(
        run["heldout_ptq"] == pytest.approx(0.02, abs=1e-3) for run in kept["runs"]
    )
    for claim in kept["claims"]:
        assert claim["claim"] in text and claim["verdict"] in text and claim["why"] in text
    assert len(kept["runs"]) == 3 and len(kept["effects"]) == 7
    assert (tmp_path / "out" / "factorial.png").stat().st_size > 10_000


def test_before_any_run_there_is_a_page(grid, tmp_path):
    path = page.write_factorial([], {"all": "not started"}, grid[0].cfg, tmp_path)
    assert "Nothing has been measured yet" in path.read_text() and "- all: not started" in path.read_text()


def test_current_scaling_has_no_part_in_what_exceeds_a_prediction():
    """It is never beyond anything, and its zeros would belittle the effects of others: 16 points, not 20."""
    shares = {("current", rate): 0.0 for rate in ("1e-4", "1e-5")}
    measured = invent(KEYS, (0, 1, 2), overshoot=lambda key: shares.get(key[:2], 0.4 if key[1] == "1e-4" else 0.2))
    by_name = {each["response"]: each for each in factorial.effects(measured)}
    rows = {row["effect"]: row for row in by_name["Share of tensors beyond their predicted amax"]["effects"]}
    assert rows["lr 1e-5"]["estimate"]["value"] == pytest.approx(-20) and rows["current"]["estimate"] is None
    rows = {row["effect"]: row for row in by_name["Held-out loss, W8A8 less baseline"]["effects"]}
    assert rows["current"]["estimate"] is not None
