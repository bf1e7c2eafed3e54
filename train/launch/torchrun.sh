#!/usr/bin/env bash
# All GPUs of one machine, one process each (DDP).
# Usage, from the repository: [GPUS=4] train/launch/torchrun.sh RECIPE [--a.b value ...]
set -euo pipefail
torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m train "$@" || {
  code=$?
  echo "train/launch: the run ended because a process did (the first one is named above)." \
    "Once that is mended, the same command goes on from the newest whole checkpoint." >&2
  exit "$code"
}
