#!/bin/bash
# A run on several machines without a scheduler; start it on each of them with its own NODE_RANK, 0 on the first:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine bash cli_configs/cluster/torchrun.sh --config cli_configs/sft.yaml --config cli_configs/lora.yaml --config cli_configs/strategy/ddp.yaml
# Processes on each machine: one per GPU unless NPROC_PER_NODE says otherwise.
set -eu
processes="${NPROC_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}"

exec torchrun \
  --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$processes" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  -m lightning_lora fit "$@" --trainer.num_nodes="$NNODES" --trainer.devices="$processes"
