#!/bin/bash
# A run on several SLURM nodes, one process per GPU; what follows the script's name goes to `lightning-lora fit`:
#   sbatch cli_configs/cluster/slurm.sh --config cli_configs/sft.yaml --config cli_configs/lora.yaml --config cli_configs/strategy/ddp.yaml
#SBATCH --job-name=lightning-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
# As many as tasks. Not --gpus-per-task: each process would see one GPU, and Lightning looks for its own among all.
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Two minutes before the end every process is told: the optimizer step is finished, stopped.ckpt saved, exit 143.
#SBATCH --signal=TERM@120
# The checkpoint to go on from is an argument: a job that SLURM starts again by itself would begin anew.
#SBATCH --no-requeue

exec srun lightning-lora fit "$@" --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE"
