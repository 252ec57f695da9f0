"""Disks that lack something, or are slow: disk.c, preloaded into the commands of a test."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Dict

SOURCE = Path(__file__).with_name("disk.c")


def like(folder: Path, **variables: int) -> Dict[str, str]:
    """The environment of a command on such a disk; what it lacks is named in disk.c."""
    library = folder / "disk.so"
    compiler = ["cc", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(compiler, check=True)
    named = {f"DISK_{name.upper()}": str(value) for name, value in variables.items()}
    return {"LD_PRELOAD": str(library), **named}


def command_on(disk: Dict[str, str], *command: str) -> list:
    """``command`` in that environment."""
    return ["env", *(f"{name}={value}" for name, value in disk.items()), *command]
