"""The command line of a rank: ``python -m trainer COMMAND``."""

from __future__ import annotations

from .cli.main import run

if __name__ == "__main__":
    run()
