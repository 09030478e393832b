#!/bin/bash
# Train one model per line of a file, each with one GPU. A line has settings, separated by spaces. For 12 lines:
#   sbatch --array=1-12 array.sh settings.txt trainer.max_epochs=10
#SBATCH --job-name=minigpt
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120       # 120 seconds before the end: the task saves, and this element is queued again
#SBATCH --requeue               # also after the failure of a node
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# module load, Apptainer, offline nodes: see one_node.sh

read -ra settings < <(sed --quiet "${SLURM_ARRAY_TASK_ID}p" "$1")
[ ${#settings[@]} -gt 0 ] || { echo "$1 has no settings in line $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not take it from sbatch
srun --kill-on-bad-exit=1 python -m minigpt_pl.train "${settings[@]}" "${@:2}"
