#!/bin/bash
# The whole protocol of hypothesis 1 on one node, by Slurm: sbatch slurm.sh
# FLASHOPTIM_DATA names the folder that holds the data; OUT may say where records go. Further words are options of
# `run h1`. Before its time is up the job is told to stop, and the same command goes on where it stopped.
#SBATCH --job-name=flashoptim-h1
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${FLASHOPTIM_DATA:?name the folder that holds the data of the protocol}"
exec srun --ntasks=1 flashoptim-nb run h1 --preset full --gpus "${SLURM_GPUS_ON_NODE:-8}" --out "${OUT:-runs}" "$@"
