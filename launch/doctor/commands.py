"""The action `doctor` of the command line."""

from __future__ import annotations

import argparse
from typing import Any, List


def add_doctor(actions: Any) -> None:
    doctor = actions.add_parser(
        "doctor",
        help="check whether this machine can train, and how to fix it if not",
        usage="[srun --ntasks-per-node=1] python -m launch doctor",
    )
    doctor.set_defaults(run=_run_doctor, needs_command=False)


def _run_doctor(args: argparse.Namespace, command: List[str]) -> int:
    from .doctor import examine

    return examine()
