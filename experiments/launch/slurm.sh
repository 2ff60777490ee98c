#!/usr/bin/env bash
# A command of difax on several nodes of SLURM, one task a node with all its GPUs:
#   sbatch experiments/launch/slurm.sh train --config fmnist_dit --workdir runs/flow
#   sbatch --nodes=4 experiments/launch/slurm.sh sample --weights runs/flow --out samples.npz
# A node that fails ends the job's other tasks, and SLURM queues it again: the same command goes on.
#SBATCH --job-name=difax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=difax-%j.log

set -euo pipefail

more=()
if [ "${1:-}" = train ]; then
  more=(--resume auto)
fi

# --kill-on-bad-exit: SLURM need not wait for tasks that have lost one of theirs
if srun --kill-on-bad-exit=1 difax "$@" "${more[@]}"; then
  exit 0
else
  code=$?
fi
# 2 is a mistake in the command, which another start would repeat; a node that failed is worth some
if [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${DIFAX_RESTARTS:-5}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
