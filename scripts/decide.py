"""Answer the claims of the paper by the fewest runs: train and score what is missing, judge at first and after each.

python scripts/decide.py [seeds=[0,1,2,3,4,5,6,7]] [launch.ranks=8] [report.out=report] [the overrides of a run]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat.cli import entry


def main(config, _) -> None:
    from qat.cli import preflight, runner
    from qat.cli.experiments import variant
    from qat.runs.identity import run_id
    from qat.studies import decide, factorial, measures
    from qat.studies.contrasts import OPEN
    from qat.studies.page import write_decide

    cells, left_out = decide.design(entry.overrides(), variant, config.seeds or [config.seed])
    exp8, out = cells[0], Path(config.report.out) / "decide"
    plan, verdicts = factorial.registered(), {}
    names = {run_id(job.cfg) for cell in cells for job in (cell.baseline, cell)}
    print(f"decide: {len(names)} runs of {exp8.cfg.size}; registered: {plan.texts}; {plan.cost}", flush=True)

    def judge() -> None:
        """Write the page anew, and name the claims whose verdict is new or another one."""
        measured, missing = measures.read(cells)
        judged = decide.claims(measured, exp8)
        write_decide(measured, missing | left_out, judged, exp8.cfg, out)
        for claim in judged:
            if verdicts.get(claim["key"], OPEN) != claim["verdict"]:
                print(f"\n{claim['claim']}: {claim['verdict']}. {claim['why']}", flush=True)
            verdicts[claim["key"]] = claim["verdict"]
        if judged:
            count = sum(claim["verdict"] != OPEN for claim in judged)
            print(f"\n{count} of {len(judged)} claims decided, {len(measured)} of {len(cells)} cells", flush=True)

    asked = next(cell for cell in cells if cell.cfg.benchmark.tasks)
    preflight.check(asked.cfg)  # what questions need is missed before the night, and not after it
    judge()  # what is there already
    outcomes = runner.complete(cells, config.launch.ranks, judge)
    judge()
    print(f"\ndecide: {out / 'decide.md'}")
    runner.refuse_failed(outcomes)


if __name__ == "__main__":
    entry.run(main, takes=("seeds", "launch.ranks", "report.out"), reads_text=True)
