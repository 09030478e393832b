#!/bin/bash
# Train with the CPU cores of one node:
#   sbatch cpu.sh experiment=quick
#SBATCH --job-name=minigpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1     # more than one only if the node has several sockets
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120       # to all tasks, 120 seconds before the end: they save, and the job is queued again
#SBATCH --requeue               # also after the failure of a node
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# module load, Apptainer, offline nodes: see one_node.sh

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not take it from sbatch
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 python -m minigpt_pl.train trainer=cpu "$@"
