#!/bin/bash
# Train with torchrun, which starts all processes again when one of them fails. Without it, use several_nodes.sh.
#   sbatch --nodes=4 torchrun.sh experiment=large
#SBATCH --job-name=minigpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # torchrun starts the processes of its node
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=URG@120        # 120 seconds before the end: the tasks save, and the job is queued again
#SBATCH --requeue               # also after the failure of a node
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# module load, Apptainer, offline nodes: see one_node.sh

export HEAD=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines=1)}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # srun does not take it from sbatch
# The signal is for the processes that train, which are children of torchrun. Not every SLURM sends it to them. So this
# shell sends them SIGUSR1. SIGURG itself has no effect on a program.
srun --kill-on-bad-exit=1 bash -c '
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$HEAD:$((20000 + SLURM_JOB_ID % 10000))" \
        -m minigpt_pl.train "$@" &
    trap "pkill -USR1 --parent $!" URG
    while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
    exit $code' bash "$@"
