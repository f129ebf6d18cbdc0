#!/bin/bash
# `make suite LAUNCHER=slurm`: the suite as job arrays, baselines first. An array begins when all of the one before have
# ended, well or not: a failure stops nothing else, and the same command again runs what is missing.
#
# PY=python NODES=1 RANKS=8 SBATCH="--partition=gpu --account=lab" scripts/slurm_submit.sh [the overrides of a run]
set -euo pipefail
# As the Makefile has them, for whoever comes past it.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
jobs=$(WORLD_SIZE=$((NODES * RANKS)) $PY scripts/jobs.py "$@")
read -r baselines all folder <<<"$jobs"
one="--nodes=1 --gpus-per-node=1 --cpus-per-task=8"
many="--nodes=$NODES --gpus-per-node=$RANKS --cpus-per-task=$((8 * RANKS))"

submit() { # name, lines of the file, size, dependency, script
  sbatch --parsable --export=ALL --job-name="hif8-$1" --array="$2" $3 $4 --output="$folder/$1-%a.log" \
    ${SBATCH:-} scripts/slurm_job.sh "$PY" "$RANKS" "$folder" "$5" | cut -d ';' -f 1
}
trained=$(submit baselines "0-$((baselines - 1))" "$many" "" train.py)
scored=$(submit baseline-scores "0-$((baselines - 1))" "$one" "--dependency=afterany:$trained" eval.py)
if [ "$all" -gt "$baselines" ]; then
  trained=$(submit runs "$baselines-$((all - 1))" "$many" "--dependency=afterany:$trained" train.py)
  scored=$(submit run-scores "$baselines-$((all - 1))" "$one" "--dependency=afterany:$trained:$scored" eval.py)
fi
submit report "$all" "$one" "--dependency=afterany:$scored" report.py >"$folder/report-job"
echo "$baselines baselines and $((all - baselines)) runs are queued; logs: $folder/; the report is job $(cat "$folder/report-job")"
