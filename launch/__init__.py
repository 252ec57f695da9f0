"""What happens before a rank exists: start N copies of any command so that Horovod finds itself.

`python -m launch --help` lists the ways: `local` (this machine), `slurm` (many machines),
`slurm-rank` (inside a Slurm allocation), `elastic-rank` (under elastic horovodrun) and `doctor`
(can this machine train?). In a notebook or a script `launch.run(function, ranks=2)` does it for a
Python function.
"""

from __future__ import annotations

from typing import Any

__all__ = ["__version__", "run"]


def __getattr__(name: str) -> Any:
    # Late, because a job script runs `python -m launch` where Horovod need not be.
    if name == "run":
        from .local.function import run

        return run
    if name == "__version__":
        from .core import streams

        return streams.version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
