#!/usr/bin/env bash
# All GPUs of one machine, one process each: DDP, or what the recipe asks for (docs/engines.md).
# Usage, from the repository: [GPUS=4] train/launch/torchrun.sh RECIPE [--a.b value ...]
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m train "$@"
