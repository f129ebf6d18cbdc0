"""Make the Weights & Biases workspace that compares the runs, or send a run folder again from scratch.

python scripts/dashboard.py [dashboard.out=dashboard.json] [benchmark=paper]
python scripts/dashboard.py run=runs/<id> [logger.mode=online] [benchmark=paper]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat import cli


def main(config, _) -> None:
    if config.run:
        _send(config)
        return
    try:
        from qat import dashboard, files
    except Exception as error:  # wandb's own imports, too, may raise anything
        raise cli.UserError(f"W&B cannot be imported ({error}); install it again by `make setup`") from error
    out = config.dashboard.out
    entity = "entity" if out else dashboard.entity()  # a specification names none
    workspace = dashboard.workspace(entity, config.logger.project, config.benchmark.tasks)
    if out:
        files.replace(Path(out), dashboard.specification(workspace))
    print(f"dashboard: {out or dashboard.save(workspace)}")


def _send(config) -> None:
    from qat.runs import Run
    from qat.tracking import send

    name, mode = config.logger.name, config.logger.mode
    if name == "local" or mode == "disabled":
        raise cli.ConfigError(f"logger={name} logger.mode={mode}: sends nothing; leave out both, or logger.mode=online")
    cfg = cli.of_folder(config, "logger", "benchmark")
    cfg.logger = config.logger
    run = Run.of(cfg)
    send(run, cfg, required=True)
    if mode == "offline":
        print(f"mirrored offline; send it: wandb sync {run.path}/wandb/offline-run-*")


if __name__ == "__main__":
    cli.entry(main, takes=("run",))
