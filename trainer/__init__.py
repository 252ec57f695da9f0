"""What happens inside a rank: data, model, step, metrics, checkpoints and the loop over them.

In a notebook: ``from trainer import Config, fit`` and ``fit(net, Config())``.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["Config", "fit"]

if os.path.expanduser("~") == "~":
    # A user id without an account (containers), and no HOME: matplotlib would fail in mid-run.
    os.environ["HOME"] = "/"  # as Docker sets it


def __getattr__(name: str) -> Any:
    # Late, because the command line has to set the number of threads before MXNet is loaded.
    if name == "fit":
        from .loop import fit

        return fit
    if name == "Config":
        from .config import Config

        return Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
