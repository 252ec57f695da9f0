"""Times the README's commands in a fresh clone of the repository.

    python -m benchmarks.fresh_clone

Clones this repository into a temporary folder and runs there, with an empty HOME and so without
any cache: set-up with data, `make train`, set-up again, `make lint` and `make test`. Prints the
duration of each and writes results/fresh_clone.json, with the last lines of their output.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("make setup data", "make train", "make setup data", "make lint", "make test")
OURS = ("PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")  # they would lead out of the clone


def run(command: str, folder: Path, home: Path) -> Dict[str, Any]:
    """Run ``command`` in ``folder``, showing its output; exits if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment["HOME"] = str(home)
    return report.run(command, command.split(), folder, environment)


def main() -> None:
    """Run the commands, print their durations and write the results."""
    before = report.machine()
    with tempfile.TemporaryDirectory() as temporary:
        clone, home = Path(temporary) / "clone", Path(temporary) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        figures = [run(command, clone, home) for command in COMMANDS]
    print(report.table(("command", "seconds"), [(f["command"], f["seconds"]) for f in figures]))
    print(report.write("fresh_clone", figures, before))


if __name__ == "__main__":
    main()
