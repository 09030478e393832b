#!/bin/bash
# Train with torchrun, which starts all processes again when one of them fails. Without it, use several_nodes.sh.
#   sbatch --nodes=4 torchrun.sh experiment=large
#SBATCH --job-name=minigpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # torchrun starts the processes of its node
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120       # to all tasks, 120 seconds before the end: they save, and the job is queued again
#SBATCH --requeue               # also after the failure of a node
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# module load, Apptainer, offline nodes: see one_node.sh

head=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines=1)}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not take it from sbatch
# The signal is for the processes that train. torchrun itself would end.
srun --kill-on-bad-exit=1 env --ignore-signal=USR1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
    -m minigpt_pl.train "$@"
