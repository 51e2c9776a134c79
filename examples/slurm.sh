#!/bin/bash
# The experiment on SLURM: `sbatch slurm.sh`. srun tells each task where it stands.
#SBATCH --job-name=mnist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
# Two minutes before the end: the run is saved, and goes on when the job is queued again.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu

export KERAS_BACKEND="${KERAS_BACKEND:-tensorflow}"
run="${RUN:-runs/mnist-$SLURM_JOB_ID}"

# Tasks fill one node after the other, and all end when one fails.
exec srun --distribution=block --kill-on-bad-exit=1 \
    loopscope train experiment.py:experiment --run "$run" --resume
