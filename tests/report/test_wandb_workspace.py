"""The workspace by code: what is in it, where it goes, and what is said without a key. (That its panels name only what
is mirrored is in test_evaluate.py, which has such a run.)"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest

import qat.report
from qat.config import ROLES
from qat.report import wandb_workspace
from qat.runs.folder import Run
from qat.runs.identity import run_id
from tests.helpers.synthetic_runs import config, write_run

TASKS = ["mmlu", "arc_easy"]


def parts(workspace) -> tuple[dict, dict[str, list[dict]]]:
    """(the set of runs, the settings of its panels by kind) of a workspace, out of what W&B would store."""
    section = json.loads(wandb_workspace.specification(workspace))["section"]
    panels = defaultdict(list)
    for each in section["panelBankConfig"]["sections"]:
        for panel in each["panels"]:
            panels[panel["viewType"]].append(panel.get("config", {}))
    return section["runSets"][0], panels


def test_runs_are_grouped_with_their_baseline_and_sorted_by_columns_of_differences():
    run_set, panels = parts(wandb_workspace.workspace("someone", "hif8-qat", TASKS))
    assert [key["name"] for key in run_set["grouping"]] == ["seed.value", "optim.value.lr", "displayName"]
    assert [key["key"]["name"] for key in run_set["sort"]["keys"]] == ["seed", "optim.lr", "experiment"]
    shown = {"summary:loss_ape_percent", "summary:w8a8/mmlu/points", "summary:w8a8/arc_easy/points"}
    assert shown <= {key for key, pinned in run_set["runFeed"]["columnPinned"].items() if pinned}
    bars = {key for panel in panels["Bar Chart"] for key in panel["metrics"]}
    wanted = {
        f"{mode}/{task}/{key}" for mode in ("w8a8", "bf16") for task in TASKS for key in ("points", "relative_drop")
    }
    assert wanted <= bars and not any("hellaswag" in key for key in bars)
    plots = panels["Run History Line Plot"]
    assert [panel["metricRegex"] for panel in plots if panel.get("useMetricRegex")] == [
        "^validation/",
        "^shadow/.*/damage$",
    ]
    lines = {key for panel in plots for key in panel.get("metrics", [])}
    assert {"train/loss", "compare/loss_difference", *(f"telemetry/{r}/overshoot_max" for r in ROLES)} <= lines
    assert len(panels["Run Comparer"]) == len(panels["Parallel Coordinates Plot"]) == 1


def test_without_a_key_it_is_written_to_a_file(main, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    code, _, said = main("dashboard.py", "benchmark=smoke")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "`wandb login`" in said and "dashboard.out=dashboard.json" in said
    code, said, _ = main("dashboard.py", "dashboard.out=dashboard.json", "benchmark=quick")
    assert code == 0 and said == "dashboard: dashboard.json\n"
    section = json.loads((tmp_path / "dashboard.json").read_text())["section"]
    names = [each["name"] for each in section["panelBankConfig"]["sections"]]
    assert names[0] == "Loss" and names[-1] == "Settings"
    assert "w8a8/hellaswag/points" in (tmp_path / "dashboard.json").read_text()


def test_a_broken_wandb_is_said_in_one_line(main, monkeypatch):
    monkeypatch.delattr(qat.report, "wandb_workspace", raising=False)
    monkeypatch.setitem(sys.modules, "qat.report.wandb_workspace", None)
    code, _, said = main("dashboard.py", "dashboard.out=dashboard.json")
    assert code == 2 and said.startswith("error: W&B cannot be imported (") and said.count("\n") == 1


@pytest.mark.parametrize("entity", ["a-team", None])
def test_with_a_key_it_is_saved_for_whoever_is_logged_in(main, monkeypatch, entity):
    saved, api = [], SimpleNamespace(settings={"entity": entity}, default_entity="someone")

    def save(self):
        saved.append((self.entity, self.project))
        self._internal_name = "nw-1-v"
        return self

    monkeypatch.setattr("wandb.Api", lambda: api)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", save)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.url", "https://there")
    code, said, _ = main("dashboard.py", "logger.project=mine")
    assert code == 0 and said == "dashboard: https://there\n" and saved == [(entity or "someone", "mine")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run=nowhere",), "not a run folder (no config.yaml)"),
        (("run=nowhere", "logger=local"), "logger=local logger.mode=offline: sends nothing; leave out both"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_one_line(main, words, said):
    code, _, error = main("dashboard.py", *words)
    assert code == 2 and said in error and error.count("\n") == 1


def test_a_folder_is_sent_again_with_the_scores_of_its_own_benchmark(main, monkeypatch, tmp_path):
    sent = []
    send = lambda run, cfg, comparison, required: sent.append((cfg.benchmark.name, cfg.logger.mode))  # noqa: E731
    monkeypatch.setattr("qat.train.wandb_log.send", send)
    folder = write_run(
        tmp_path / "made", config(**{"benchmark.name": "full", "benchmark.tasks": {"mmlu": {}}, "data.path": "a/b"})
    )
    folder = folder.rename(tmp_path / run_id(Run(folder).typed_config()))
    for words in ((), ("benchmark=smoke", "logger.mode=online")):
        code, _, said = main("dashboard.py", f"run={folder}", *words)
        assert code == 0, said
    assert sent == [("full", "offline"), ("smoke", "online")]
