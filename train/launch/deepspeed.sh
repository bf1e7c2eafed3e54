#!/usr/bin/env bash
# All GPUs of one machine, started by DeepSpeed's launcher; needs make extras EXTRAS=train and a line
# such as `deepspeed: zero2` in each stage's training. (train/launch/torchrun.sh runs the same recipe.)
# Usage, from the repository: [GPUS=8] train/launch/deepspeed.sh RECIPE [--a.b value ...]
# Several machines: HOSTFILE=FILE, a line "name slots=8" each, with ssh between them; or
# train/launch/multi_node.sh, which needs neither.
set -euo pipefail
# --no_local_rank: the launcher would put a --local_rank among our words.
exec deepspeed ${GPUS:+--num_gpus "$GPUS"} ${HOSTFILE:+--hostfile "$HOSTFILE"} \
  ${PORT:+--master_port "$PORT"} --no_local_rank --module train "$@"
