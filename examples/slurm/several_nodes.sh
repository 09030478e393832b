#!/bin/bash
# Train one model with the GPUs of several nodes. All nodes must see the folder where you start it:
#   sbatch --nodes=4 several_nodes.sh experiment=large
#SBATCH --job-name=minigpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4     # one task per GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120       # to all tasks, 120 seconds before the end: they save, and the job is queued again
#SBATCH --requeue               # also after the failure of a node
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# module load, Apptainer, offline nodes: see one_node.sh

# NCCL chooses the network between the nodes. If it takes a wrong one, name it (`ip address` lists them):
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO         # prints its choice
# The first process waits at the name of the first node. If the nodes know it by another name or address, give that:
# export MASTER_ADDR=10.0.0.1

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not take it from sbatch
srun --kill-on-bad-exit=1 python -m minigpt_pl.train "$@"
