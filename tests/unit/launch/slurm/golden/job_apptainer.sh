#!/bin/bash
# Made by: python -m launch slurm -- python -m trainer train configs/fashion_mnist.yaml optimizer.lr=0.2
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --account=lab
#SBATCH '--output=/home/me/my project/slurm-%j.log'
#SBATCH --open-mode=append
#SBATCH --signal=USR1@60
#SBATCH --requeue

cd '/home/me/my project' || exit 1
module load apptainer

# Runs srun, names the rank that failed first; requeues the job when it was warned
# (time limit, preemption) and all ranks have saved and ended with exit code 85.
exec /opt/py/bin/python -m launch slurm-job --save-seconds=60 --max-requeues=3 -- \
    srun --label --kill-on-bad-exit=0 --wait=120 \
    apptainer exec --nv '--bind=/home/me/my project:/home/me/my project,/data:/data' '--pwd=/home/me/my project' ngc.sif \
    python -m launch slurm-rank -- \
    python -m trainer train configs/fashion_mnist.yaml optimizer.lr=0.2
