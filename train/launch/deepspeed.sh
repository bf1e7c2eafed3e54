#!/usr/bin/env bash
# All GPUs of one machine with ZeRO; needs pip install -e '.[train]' and training.deepspeed in the recipe.
# Each stage gets processes of its own: DeepSpeed's state cannot be reset within one.
# Usage, from the repository: [GPUS=8] train/launch/deepspeed.sh RECIPE "align instruct" [--a.b value ...]
set -euo pipefail
recipe="$1"
stages="$2"
shift 2
for stage in $stages; do
  deepspeed ${GPUS:+--num_gpus "$GPUS"} --no_local_rank --module train "$recipe" --stage "$stage" "$@"
done
