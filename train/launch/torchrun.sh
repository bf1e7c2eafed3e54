#!/usr/bin/env bash
# All GPUs of one machine, one process each (DDP).
# Usage, from the repository: [GPUS=4] train/launch/torchrun.sh RECIPE [--a.b value ...]
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m train "$@"
