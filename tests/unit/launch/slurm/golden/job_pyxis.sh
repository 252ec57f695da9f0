#!/bin/bash
# Made by: python -m launch slurm -- python -m trainer train configs/fashion_mnist.yaml optimizer.lr=0.2
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH '--output=/home/me/my project/slurm-%j.log'
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --constraint=h100

cd '/home/me/my project' || exit 1

# Runs srun, names the rank that failed first; requeues the job when it was warned
# (time limit, preemption) and all ranks have saved and ended with exit code 85.
exec /opt/py/bin/python -m launch slurm-job --save-seconds=300 --max-requeues=10 -- \
    srun --label --kill-on-bad-exit=0 --wait=120 --cpu-bind=cores \
    '--container-image=nvcr.io#nvidia/mxnet:24.06-py3' '--container-mounts=/home/me/my project:/home/me/my project' '--container-workdir=/home/me/my project' \
    python -m launch slurm-rank -- \
    python -m trainer train configs/fashion_mnist.yaml optimizer.lr=0.2
