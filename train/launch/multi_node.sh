#!/usr/bin/env bash
# Several machines that share the file system of the repository, the data and output_dir.
# Start it on every machine, e.g. with srun, one task per machine; NODES and HEAD are the same on all.
# Usage: NODES=4 HEAD=host0 [GPUS=8] [PORT=29500] train/launch/multi_node.sh RECIPE [--a.b value ...]
set -euo pipefail
exec torchrun --nnodes "${NODES:?number of machines}" --nproc-per-node "${GPUS:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name of the first machine}:${PORT:-29500}" \
  --rdzv-id "${RUN_ID:-vlm}" -m train "$@"
