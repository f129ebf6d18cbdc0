"""Answer the paper's claims with the fewest runs: train and score what is missing, and judge after every run.

python scripts/decide.py [seeds=[0,1,2,3,4,5,6,7]] [launch.ranks=8] [report.out=report] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qat.cli import runner
    from qat.cli.experiments import variant
    from qat.runs.identity import run_id
    from qat.studies import decide, factorial, measures
    from qat.studies.page import write_decide

    cells = decide.design(HydraConfig.get().overrides.task, variant, config.seeds or [config.seed])
    exp8, out = cells[0], Path(config.report.out) / "decide"
    plan, verdicts = factorial.registered(), {}
    names = {run_id(each.cfg) for cell in cells for each in (cell.baseline, cell)}
    print(f"decide: {len(names)} runs of {exp8.cfg.size}; registered: {plan.texts}; {plan.cost}", flush=True)

    def judge() -> None:
        """Write the page anew, and name the claims whose verdict is new or another one."""
        measured, missing = measures.read(cells)
        judged = decide.claims(measured, exp8)
        write_decide(measured, missing, judged, exp8.cfg, out)
        for claim in judged:
            if verdicts.get(claim["key"], decide.OPEN) != claim["verdict"]:
                print(f"\n{claim['claim']}: {claim['verdict']}. {claim['why']}", flush=True)
            verdicts[claim["key"]] = claim["verdict"]
        done = len(cells) - len(missing)
        print(
            f"\n{len(decide.decided(judged))} of {len(judged)} claims decided, {done} of {len(cells)} cells", flush=True
        )

    # A cell that answers questions is the run of one that does not.
    text = [cell for cell in cells if not cell.cfg.benchmark.tasks]
    outcomes = runner.complete(text, config.launch.ranks, judge)
    outcomes += runner.complete([cell for cell in cells if cell.cfg.benchmark.tasks], config.launch.ranks, judge)
    judge()
    print(f"\ndecide: {out / 'decide.md'}")
    runner.refuse_failed(outcomes)


if __name__ == "__main__":
    entry.run(main, takes=("seeds", "launch.ranks"), reads_text=True)
