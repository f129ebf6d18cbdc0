"""The sensitivity study on a tiny model: its ends are known models, what was planted is found, and it goes on."""

from __future__ import annotations

import copy
import json
from unittest import mock

import pytest
import torch

from qat.analysis import sensitivity as analysis
from qat.errors import ConfigError, UserError
from qat.models.load import load_model
from qat.quant.convert import convert, quantized_linears
from qat.report import record
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.studies import auto_quantize, sensitivity, sensitivity_page
from qat.studies.sensitivity import Group, Switchboard, groups
from tests.helpers.scored import subjects

SMALL = {"sensitivity.tokens": 512, "sensitivity.questions": 0}


@pytest.fixture(scope="module")
def board(scored):
    """The W8A8 run of `scored`, whose blocks 3 to 5 are rounded."""
    return Switchboard(subjects(scored[0])["w8a8"].build()[0])


@pytest.fixture(scope="module")
def unit():
    tokens = torch.randint(257, (3, 33), generator=torch.Generator().manual_seed(0))
    return sensitivity.of_text("embedded", tokens, torch.arange(3))[0]


def test_groups_cover_every_tensor_once_at_every_level(board):
    counts = {level: len(groups(board.rounded, level)) for level in sensitivity.LEVELS}
    # Three weights a block, and two inputs: gate and up share theirs.
    assert counts == {"role": 2, "block": 6, "projection": 5, "linear": 15} and board.resumes
    for level in sensitivity.LEVELS:
        members = [index for group in groups(board.rounded, level).values() for index in group.tensors]
        assert sorted(members) == sorted(board.rounded)
    named = groups(board.rounded, "linear")
    assert "4/mlp.gate_proj+up_proj/activation" in named and named["4/mlp.down_proj/weight"].first == 4


def test_the_ends_are_the_unquantized_and_the_quantized_model(board, unit, scored):
    ends = {"all": Group(board.all, 3), "none": Group(frozenset(), 3)}
    values = board.measure(unit, ends)
    assert values["alone"]["all"] == values["left_out"]["none"] == values["quantized"] != values["unquantized"]
    assert values["alone"]["none"] == values["left_out"]["all"] == values["unquantized"]
    plain, _ = subjects(scored[0])["bf16"].build()
    with torch.no_grad():
        logits = plain(input_ids=unit.pieces[0].tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits.mT, unit.pieces[0].labels, reduction="none").mean(1)
    assert values["unquantized"]["loss"] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert values["unquantized"]["kl"] == pytest.approx([0] * 3, abs=1e-6) and min(values["quantized"]["kl"]) > 0


def test_known_outputs_of_blocks_change_no_number_and_save_work(board, unit, monkeypatch):
    chosen = groups(board.rounded, "linear")
    calls = []
    hook = board.blocks[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    resumed = board.measure(unit, chosen)
    assert len(calls) == 2  # unquantized and quantized
    monkeypatch.setattr(board, "resumes", False)
    assert board.measure(unit, chosen) == resumed and len(calls) == 2 + 2 + 2 * len(chosen)
    hook.remove()


def test_a_question_is_a_pass_for_choices_that_differ_in_their_last_token():
    def shapes(*choices):
        question = sensitivity.benchmarks.Question([1, 2, 3], list(choices), 1)
        made = sensitivity.of_question("mmlu", question, max_length=100)
        return [(piece.tokens.tolist(), piece.labels.tolist()) for piece in made.pieces]

    assert shapes([7], [8]) == [([[1, 2, 3]], [[7], [8]])]
    assert shapes([7, 4], [8, 4, 5]) == [([[1, 2, 3, 7]], [[7, 4]]), ([[1, 2, 3, 8, 4]], [[8, 4, 5]])]


def test_answers_are_those_of_an_evaluation(board, scored):
    """The questions of `scored` on its W8A8 model, whose samples are in its folder."""
    cfg = scored[0]
    _, tokenizer = load_model(cfg.model, cfg.seed)
    limit = sensitivity.context_length(board.model.config)
    asked = sensitivity.benchmarks.tokenized(board.model, tokenizer, cfg.benchmark, limit)
    for task, questions in asked.items():
        samples = Run.of(cfg).samples("smoke", "w8a8", task)
        for question, sample in zip(questions, samples, strict=True):
            values = board.measure(sensitivity.of_question(task, question, limit), {})
            assert values["quantized"]["logprobs"] == pytest.approx(sample["logprobs"], abs=2e-3)
            assert question.target == sample["target"]


def test_questions_answered_by_letters_are_read_together_with_the_same_result(board):
    """Six prompts of unlike lengths, five with four choices of a token and one with two; one of longer choices."""
    generator = torch.Generator().manual_seed(0)
    lengths, choices = (9, 3, 17, 4, 30, 6), [[[65], [66], [67], [68]]] * 5 + [[[65], [66]]]
    questions = [
        sensitivity.benchmarks.Question(torch.randint(257, (n,), generator=generator).tolist(), each, n % 2)
        for n, each in zip(lengths, choices, strict=True)
    ]
    long = sensitivity.benchmarks.Question([1, 2, 3], [[4, 5], [6]], 1)
    units = sensitivity.of_questions("mmlu", [*questions, long], 20)
    assert [unit.facts["targets"] for unit in units] == [[1], [1, 0, 1, 1, 0], [0]] and len(units[0].pieces) == 2
    chosen = groups(board.rounded, "role")
    together = board.measure(units[1], chosen)
    alone = [board.measure(sensitivity.of_question("mmlu", question, 20), chosen) for question in questions[:5]]
    alone = [alone[place] for place in (1, 3, 0, 2, 4)]  # by length
    for path in (("quantized",), ("unquantized",), ("alone", "weight"), ("left_out", "activation")):
        wanted = [value for each in alone for value in analysis._at(each, path)["logprobs"]]
        assert analysis._at(together, path)["logprobs"] == pytest.approx(wanted, abs=1e-4)
    content = {"measured": {"role": {"mmlu": {"a": units[1].facts | together}}}}
    assert len(analysis.series(content, "role", "logprob", ("quantized",))) == 5


def test_a_block_whose_weights_lose_their_bits_is_found(config):
    """The scale of one tensor is that of an outlier of a million times its largest weight."""
    cfg = config("experiment=exp8", **{"sensitivity.of": "pretrained"})
    model, _ = load_model(cfg.model, cfg.seed)
    bank, _ = convert(model.eval(), sensitivity.subject(cfg, cfg.quant).cfg)
    tokens = torch.randint(257, (16, 65), generator=torch.Generator().manual_seed(0))
    units = sensitivity.of_text("embedded", tokens, torch.arange(16))
    with torch.no_grad():
        for linear in quantized_linears(model).values():
            linear.weight *= 8  # else the blocks hardly matter beside the residual stream
        model(input_ids=tokens[:, :-1])
    bank.tick()
    bank.freeze()
    bank.scale[bank.names.index("model.layers.4.mlp.up_proj/weight")] /= 1e6
    board = Switchboard(model)
    content = {"measured": {}}
    for level in ("block", "linear"):
        chosen = groups(board.rounded, level)
        values = {unit.key: unit.facts | board.measure(unit, chosen) for unit in units}
        content["measured"][level] = {"embedded": values}
    for way in analysis.WAYS:
        for level, name in (("block", "4/weight"), ("linear", "4/mlp.up_proj/weight")):
            rows = sorted(analysis.rows(content, level, "kl", way), key=lambda row: -row["difference"])
            assert rows[0]["group"] == name and rows[0]["difference"] > 3 * abs(rows[1]["difference"])
    assert analysis.first_choices(content)[0] == [4]


@pytest.mark.slow
def test_model_optimizer_scores_every_block(board, scored, tmp_path, monkeypatch):
    """It takes half a minute to import."""
    library = pytest.importorskip("modelopt.torch.quantization")
    study = sensitivity.Study(scored[0], subjects(scored[0])["w8a8"], tmp_path)
    tokens = torch.randint(257, (32, 65), generator=torch.Generator().manual_seed(0))
    units = sensitivity.of_text("embedded", tokens, torch.arange(32))

    def scores() -> dict | str:
        study.content.pop("auto_quantize", None)
        study._check_choices(board, units, [])
        return study.content["auto_quantize"]

    found = scores()
    assert set(found) == {"3", "4", "5"} and min(found.values()) > 0
    chosen = groups(board.rounded, "block")
    values = {unit.key: unit.facts | board.measure(unit, chosen) for unit in units}
    content = {"measured": {"block": {"embedded": values}}, "auto_quantize": found}
    order, correlation = analysis.agreement(content)
    assert [str(block) for block in order] == sorted(found, key=found.get, reverse=True) and correlation >= 0.5
    monkeypatch.setattr(library, "auto_quantize", mock.Mock(side_effect=[ValueError("not\nthis model"), KeyError(1)]))
    assert scores() == "ValueError: not this model"
    with pytest.raises(KeyError):  # no refusal but a defect
        scores()


def test_model_optimizer_is_asked_again_until_it_has_scores(board, scored, tmp_path, monkeypatch):
    study = sensitivity.Study(scored[0], subjects(scored[0])["w8a8"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(auto_quantize.importlib.util, "find_spec", lambda name: None)
        assert auto_quantize.scores(study.subject, {}, []) == "it is not installed: pip install -e '.[ptq]'"
    answers = iter(["ValueError: not this model", {"3": 1.0}])
    monkeypatch.setattr(auto_quantize, "scores", lambda *_: next(answers))
    for known in ("ValueError: not this model", {"3": 1.0}, {"3": 1.0}):
        study._check_choices(board, [], [])
        assert study.content["auto_quantize"] == known


def test_a_single_block_has_no_rank_correlation():
    unit = {"documents": [0, 1], "unquantized": {"kl": [0.0, 0.0]}, "alone": {"4/weight": {"kl": [0.1, 0.2]}}}
    content = {"measured": {"block": {"text": {"unit": unit}}}, "auto_quantize": {"4": 1.0}}
    text = sensitivity_page._agreement(content)
    assert text.endswith("the KL of a block rounded alone have no rank correlation (Spearman, 1 block).")


@pytest.mark.parametrize("tokens", [128, 512, 200_000])
def test_a_choice_of_blocks_is_checked_on_other_documents(scored, tmp_path, tokens):
    """Ask for 400 thousand tokens, so that documents have more than one sequence."""
    cfg = copy.deepcopy(scored[0])
    cfg.sensitivity.tokens = tokens
    parts = sensitivity.Study(cfg, subjects(cfg)["w8a8"], tmp_path)._texts(load_model(cfg.model, cfg.seed)[1])
    first, other = ({(u.source, d) for u in units for d in u.facts["documents"]} for units in parts)
    assert first and other and not first & other
    assert tokens < 1000 or len(first) < sum(len(unit.facts["documents"]) for unit in parts[0])


@pytest.mark.parametrize("key, value", [("tokens", 256), ("questions", 2), ("task", "arc_easy"), ("groups", ["role"])])
def test_what_was_measured_for_another_request_is_left(scored, tmp_path, key, value):
    cfg = copy.deepcopy(scored[0])
    before = sensitivity.Study(cfg, subjects(cfg)["w8a8"], tmp_path)
    before.content["seconds"] = 7.0
    before._write()
    setattr(cfg.sensitivity, key, value)
    again = sensitivity.Study(cfg, subjects(cfg)["w8a8"], tmp_path).content["seconds"]
    assert again == (7.0 if key == "groups" else 0.0)  # groups are measured beside others


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_measures_a_run_and_goes_on_where_it_was_stopped(scored, main, tmp_path, monkeypatch):
    run = Run.of(scored[0])
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    words = [f"run={run.path}", "report.out=out", *(f"{key}={value}" for key, value in SMALL.items())]
    done, measure = [], Switchboard.measure

    def stopping(self, unit, *more):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(unit.key)
        return measure(self, unit, *more)

    monkeypatch.setattr(auto_quantize, "scores", lambda *_: "it is not installed")
    monkeypatch.setattr(Switchboard, "measure", stopping)
    assert main("sensitivity.py", *words)[0] == 130
    monkeypatch.setattr(Switchboard, "measure", lambda *given: done.append(given[1].key) or measure(*given))
    code, stdout, _ = main("sensitivity.py", *words)
    folder = tmp_path / "out" / "sensitivity" / run.id
    assert code == 0 and f"sensitivity: {folder.relative_to(tmp_path)}/sensitivity.html" in stdout
    # A unit of either text at four levels, and one of either to check the choice of blocks on.
    assert len(done) == 4 * 2 + 2
    assert {path.name for path in folder.iterdir()} == {f"sensitivity.{end}" for end in ("md", "html", "json", "png")}
    text, content = (folder / "sensitivity.md").read_text(), json.loads((folder / "sensitivity.json").read_text())
    assert "quant.bf16_also=[" in text and "4/weight" in text and "(it is not installed)" in text
    assert content["results"]["block"]["loss alone"][0]["group"] == "3/weight"
    assert {path: path.read_bytes() for path in before} == before
    record.keep_report(tmp_path / "out", tmp_path / "record")
    copied = {path.name for path in (tmp_path / "record" / "sensitivity" / run.id).iterdir()}
    assert copied == {f"sensitivity.{end}" for end in ("md", "json", "png")}
    done.clear()
    assert main("sensitivity.py", *words)[0] == 0 and not done


def test_the_command_rounds_a_checkpoint_as_the_run_that_it_names(config, main, monkeypatch):
    cfg = config("experiment=exp8", **{"quant.format": "fp8_e4m3", "quant.overflow": "inf", "quant.bf16_blocks": 0})
    run, baseline = Run.of(cfg), Run.of(baseline_of(cfg))
    run.create(cfg)
    baseline.create(baseline_of(cfg))
    asked, subject = [], sensitivity.subject

    def asking(*given):
        asked.append(subject(*given))
        raise UserError("asked")

    monkeypatch.setattr(sensitivity, "subject", asking)
    for of in ("baseline", "pretrained"):
        assert main("sensitivity.py", f"run={run.path}", f"sensitivity.of={of}")[0] == 2
        assert asked[-1].cfg.quant == cfg.quant and asked[-1].calibrated
    assert main("sensitivity.py", f"run={baseline.path}", "quant=hif8", "quant.target_weight=8")[0] == 2
    assert (asked[-1].cfg.quant.format, asked[-1].cfg.quant.target_weight) == ("hif8", 8)


def test_a_bf16_run_is_measured_under_ptqs_scales(scored, monkeypatch):
    cfg = scored[0]
    baseline = baseline_of(cfg)
    ptq = sensitivity.subject(baseline, cfg.quant)
    known = subjects(cfg)["ptq"]
    assert (ptq.run.path, ptq.mode) == (known.run.path, known.mode) and ptq.calibrated
    models = [subject.build()[0] for subject in (ptq, known)]
    scales = [next(iter(quantized_linears(model).values())).bank.scale for model in models]
    assert torch.equal(*scales)
    cfg.sensitivity.of = "baseline"
    try:
        assert sensitivity.subject(cfg, cfg.quant).mode == known.mode
    finally:
        cfg.sensitivity.of = "run"


def test_what_cannot_be_measured_is_refused(config):
    cfg = config("experiment=exp8")
    for words, message in (
        ({"quant.format": "none"}, "nothing is rounded"),
        ({"quant.weights": False, "quant.activations": False}, "nothing is rounded"),
        ({"quant.gemm": "fp8"}, "name a run with quant.gemm=bf16"),
    ):
        changed = config("experiment=exp8", **words)
        with pytest.raises(ConfigError, match=message):
            sensitivity.subject(changed, changed.quant)
    with pytest.raises(UserError, match="is not started; train it first"):
        sensitivity.subject(cfg, cfg.quant).check()
