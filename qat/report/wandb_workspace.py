"""The comparison as a Weights & Biases workspace: what `qat.train.wandb_log` mirrors, laid out by code."""

from __future__ import annotations

import json
from collections.abc import Iterable

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from qat.analysis.compare import MODES, task_name
from qat.config import ROLES
from qat.errors import UserError

_SETTINGS = ("scaling.algo", "scaling.window", "warmup.bf16", "optim.lr")  # the axes of `make sweep`


def workspace(entity: str, project: str, tasks: Iterable[str]) -> ws.Workspace:
    """Return the workspace of a W&B project whose runs are scored on the benchmark `tasks`. Runs are grouped by seed
    and learning rate, with their baseline; the differences are columns, to sort and filter by."""
    tasks = list(tasks)
    sections = [_loss(), *(_scores(mode, tasks) for mode in MODES if mode != "control"), _scales(), _settings(tasks)]
    differences = ["loss_ape_percent", *(f"w8a8/{task}/points" for task in tasks)]
    decisions = ["w8a8/heldout/decision", "w8a8/pooled/contrast/decision"]
    columns = [*decisions, "w8a8/heldout/difference", *differences, "w8a8/heldout/kl", "warnings"]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="HiF8 against BF16",
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=50),
        runset_settings=ws.RunsetSettings(
            # A baseline, which several experiments share, has their seed and learning rate, and the name of one. By
            # name at last: the mean of a run and its baseline would say nothing.
            groupby=[ws.Config("seed"), ws.Config("optim.lr"), ws.Metric("Name")],
            order=[ws.Ordering(ws.Config(key)) for key in ("seed", "optim.lr", "experiment")],
            pinned_columns=[f"summary:{column}" for column in columns],
        ),
    )


def specification(workspace: ws.Workspace) -> str:
    """Return the workspace as the JSON that W&B stores."""
    return json.dumps(workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True), indent=1)


def entity() -> str:
    """Whose workspace it becomes: $WANDB_ENTITY, or who is logged in. Errors: UserError without a key or a server."""
    api = _reached(wandb.Api)
    return api.settings["entity"] or _reached(lambda: api.default_entity)


def save(workspace: ws.Workspace) -> str:
    """Save it as a new view and return its address. Errors: UserError without a server."""
    return _reached(workspace.save).url


def _reached(call):
    try:
        return call()
    except Exception as error:  # W&B's errors share no base: no key, no server, no right
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"W&B is out of reach ({reason}); `wandb login` once, or write the workspace to a file: "
            f"dashboard.out=dashboard.json"
        ) from error


def _loss() -> ws.Section:
    lines = [
        ("train/loss", "Training loss, nats a token"),
        ("compare/loss_difference", "Training loss less the baseline's, nats"),
        ("compare/loss_error_percent", "Absolute error of the training loss, % (its mean is loss APE)"),
        ("train/grad_norm", "Gradient norm before clipping"),
    ]
    bars = [
        ("loss_ape_percent", "Loss APE, % (the paper's threshold: 0.5)"),
        ("w8a8/heldout/difference", "Held-out loss less the baseline's, nats"),
        ("w8a8/pooled/contrast/difference", "Answer contrast less the baseline's, bits per byte"),
        ("w8a8/heldout/kl", "KL from the baseline, nats: how unlike, not how much worse"),
    ]
    panels = [wr.LinePlot(title=title, y=[key]) for key, title in lines]
    panels.append(wr.LinePlot(title="Held-out loss while training, nats a token", metric_regex="^validation/"))
    return _section("Loss", panels + [wr.BarPlot(title=title, metrics=[key]) for key, title in bars])


def _scores(mode: str, tasks: list[str]) -> ws.Section:
    measures = {"points": "points", "relative_drop": "relative drop, % (the paper's threshold: 1)"}
    panels = [
        wr.BarPlot(title=f"{task_name(task)}: {words}", metrics=[f"{mode}/{task}/{measure}"])
        for measure, words in measures.items()
        for task in tasks
    ]
    return _section(f"Scores against BF16: {MODES[mode]}", panels)


def _scales() -> ws.Section:
    measures = {
        "overshoot_max": "Largest overshoot",
        "overshoot_share": "Share of tensors that overshoot",
        "sqnr_db_min": "Lowest SQNR, dB",
        "tier3": "Share of values with 3 mantissa bits",
        "underflow_max": "Largest share of values made zero",
    }
    panels = [
        wr.LinePlot(title=f"{words}: {role}", y=[f"telemetry/{role}/{measure}"])
        for measure, words in measures.items()
        for role in ROLES
    ]
    lost = {"bf16": "BF16", "format": "the format"}
    panels += [
        wr.LinePlot(title=f"Share of updates lost in {words}", y=[f"telemetry/lost_updates/{key}"])
        for key, words in lost.items()
    ]
    shadow = "Loss under each rule of scaling.shadow less the unquantized one, same weights and batch, nats"
    panels.append(wr.LinePlot(title=shadow, metric_regex="^shadow/.*/damage$"))
    return _section("Scales and updates", panels)


def _settings(tasks: list[str]) -> ws.Section:
    axes = [wr.Config(setting) for setting in _SETTINGS]
    axes += [wr.SummaryMetric(key) for key in ("loss_ape_percent", *(f"w8a8/{task}/relative_drop" for task in tasks))]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=axis, log=axis == wr.Config("optim.lr")) for axis in axes]
    panels = [
        wr.ParallelCoordinatesPlot(title="What the settings cost", columns=columns),
        wr.RunComparer(diff_only="split"),
    ]
    return _section("Settings", panels)


def _section(name: str, panels: list) -> ws.Section:
    return ws.Section(name=name, panels=panels, is_open=True)
