"""What happens before a rank exists: start N copies of any command so that Horovod finds itself.

`python -m launch --help` lists the ways: `local` (this machine), `slurm` (many machines),
`slurm-rank` (inside a Slurm allocation) and `doctor` (can this machine train?).
"""
