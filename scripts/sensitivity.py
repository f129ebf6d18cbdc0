"""Say where the damage of W8A8 sits: every block, projection and role rounded alone, and left out.

python scripts/sensitivity.py [experiment=exp8] [sensitivity.of=baseline] [report.out=report] [the overrides of a run]
python scripts/sensitivity.py run=runs/<id> [sensitivity.groups=[role,block]] [quant=hif8, of a BF16 run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli.runner import train_with_baseline
    from qat.runs.identity import baseline_of
    from qat.studies import sensitivity
    from qat.studies.sensitivity_page import write_sensitivity

    cfg, quant = config, config.quant
    if config.run:
        own = entry.config_of_run(config.run).quant
        rounds = own.format != "none"  # of a BF16 run, the command line says what it is rounded to
        cfg = entry.config_of_folder(config, "sensitivity", "report", *([] if rounds else ["quant"]))
        cfg.quant, quant = own, own if rounds else quant
    subject = sensitivity.subject(cfg, quant)
    if not config.run and subject.trained:
        train_with_baseline(baseline_of(cfg) if cfg.sensitivity.of == "baseline" else cfg)
    subject.check()
    subject.check_checkpoint()
    folder = Path(cfg.report.out) / "sensitivity" / sensitivity.folder_name(subject)
    content = sensitivity.Study(cfg, subject, folder).measure()
    print(f"\nsensitivity: {write_sensitivity(content, subject, folder)}")


if __name__ == "__main__":
    entry.run(main, takes=("run", "report.out", "sensitivity"), reads_text=True)
