#!/bin/bash
# Train with the GPUs of one node. Everything after the file's name goes to the command:
#   sbatch one_node.sh experiment=large trainer.max_epochs=10
#SBATCH --job-name=minigpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4     # one task per GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120       # to all tasks, 120 seconds before the end: they save, and the job is queued again
#SBATCH --requeue               # also after the failure of a node
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# The programs, as your cluster has them:
# module load python cuda
# source ~/minigpt/bin/activate
# For Apptainer, write "apptainer exec --nv minigpt.sif" before "python" in the last line.

# If the nodes have no internet, download the data on the login node first (docs/cluster.md), and set:
# export HF_HUB_OFFLINE=1

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not take it from sbatch
srun --kill-on-bad-exit=1 python -m minigpt_pl.train "$@"
