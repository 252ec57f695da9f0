"""Slurm: job scripts, ranks from srun's variables, requeues."""
