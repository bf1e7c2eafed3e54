#!/usr/bin/env bash
# One GPU (or none). Usage, from the repository: train/launch/one_gpu.sh RECIPE [--a.b value ...]
set -euo pipefail
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" exec python -m train "$@"
