#!/usr/bin/env bash
# All GPUs of one machine, started by DeepSpeed's launcher; needs make extras EXTRAS=train and a line
# such as `deepspeed: zero2` in each stage's training. (train/launch/torchrun.sh runs the same recipe.)
# Usage, from the repository: [GPUS=8] train/launch/deepspeed.sh RECIPE [--a.b value ...]
# Several machines: HOSTFILE=FILE, a line "name slots=8" each, with pdsh and ssh between them; without
# these start it on each, with NODE_RANK=0, 1, ... and HEAD=host0, too. train/launch/multi_node.sh needs
# no such file.
set -euo pipefail
# --no_local_rank: the launcher would put a --local_rank among our words.
exec deepspeed ${GPUS:+--num_gpus "$GPUS"} ${HOSTFILE:+--hostfile "$HOSTFILE"} \
  ${NODE_RANK:+--no_ssh --node_rank "$NODE_RANK" --master_addr "${HEAD:?name of the first machine}"} \
  ${PORT:+--master_port "$PORT"} --no_local_rank --module train "$@"
