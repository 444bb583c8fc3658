#!/bin/bash
# The whole protocol of hypothesis 1 on the GPUs of one machine, by torchrun.
# FLASHOPTIM_DATA names the folder that holds the data; GPUS and OUT may say how many GPUs, and where records go.
# Further words are options of `run h1`. Stopped in any way, the same command goes on.
set -euo pipefail
: "${FLASHOPTIM_DATA:?name the folder that holds the data of the protocol}"
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec torchrun --standalone --nproc-per-node "$gpus" -m flashoptim_nb.cli.main \
    run h1 --preset full --out "${OUT:-runs}" "$@"
