"""Make the Weights & Biases workspace that compares the runs, or send a run folder again from scratch.

python scripts/dashboard.py [dashboard.out=dashboard.json] [benchmark=paper]
python scripts/dashboard.py run=runs/<id> [logger.mode=online] [benchmark=paper]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry
from qat.errors import ConfigError, UserError


def main(config, _) -> None:
    if config.run:
        _send(config)
        return
    try:
        from qat.report import wandb_workspace
        from qat.utils import files
    except Exception as error:  # wandb's own imports, too, may raise anything
        raise UserError(f"W&B cannot be imported ({error}); install it again by `make setup`") from error
    out = config.dashboard.out
    entity = "entity" if out else wandb_workspace.entity()  # a specification names none
    workspace = wandb_workspace.workspace(entity, config.logger.project, config.benchmark.tasks)
    if out:
        files.replace(Path(out), wandb_workspace.specification(workspace))
    print(f"dashboard: {out or wandb_workspace.save(workspace)}")


def _send(config) -> None:
    from qat.analysis.compare import comparison_of
    from qat.runs.folder import Run
    from qat.train.wandb_log import send

    name, mode = config.logger.name, config.logger.mode
    if name == "local" or mode == "disabled":
        raise ConfigError(f"logger={name} logger.mode={mode}: sends nothing; leave out both, or logger.mode=online")
    cfg = entry.config_of_folder(config, "logger", "benchmark")
    cfg.logger = config.logger
    run = Run.of(cfg)
    send(run, cfg, comparison_of(run, cfg.benchmark.name), required=True)
    if mode == "offline":
        print(f"mirrored offline; send it: wandb sync {run.path}/wandb/offline-run-*")


if __name__ == "__main__":
    entry.run(main, takes=("run", "dashboard"))
