#!/bin/bash
# A job of `make suite LAUNCHER=slurm`: one line of a file of jobs, an element of an array. Nodes and GPUs are asked for
# where it is submitted (qat/cli/slurm.py); SBATCH="--time=24:00:00" there overrides what stands here.
#SBATCH --ntasks-per-node=1
#SBATCH --mem-per-cpu=4G
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
trap : TERM USR1 # training saves when it is told to stop; this shell has to live to see that
python=$1 ranks=$2 folder=$3 script=$4
eval "words=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$folder/jobs"))"
# Made by whoever saves upon a signal (qat/utils/signals.py): torchrun has one exit code for everything.
export HIF8_REQUEUE=$folder/requeue-$SLURM_JOB_ID
rm -f "$HIF8_REQUEUE"

command=($python)
if [ "$script" = train.py ] && [ $((SLURM_NNODES * ranks)) -gt 1 ]; then
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  command+=(-m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" --rdzv-backend=c10d)
  command+=(--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))")
fi
# One torchrun a node. Once the first has ended, the others have the time that a checkpoint may take.
srun --kill-on-bad-exit=0 --wait="$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  "${command[@]}" "scripts/$script" "${words[@]}"
code=$?

if [ -e "$HIF8_REQUEUE" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
  rm "$HIF8_REQUEUE"
  exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # the last element has the array's number as its own
fi
exit $code
