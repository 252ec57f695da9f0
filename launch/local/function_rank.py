"""The processes behind `launch.run`: the supervisor, and the ranks themselves.

`python -m launch.local.function_rank FOLDER RANKS` supervises; without RANKS it is a rank. The
pickled function and the results are files in FOLDER, which is private to the user.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from pathlib import Path

from ..core.job import Failure
from ..core.process import die_with_parent
from ..core.streams import leave, print_line, run
from .elastic import Elastic
from .local import run_local

TASK = "task.pkl"
FAILURE = "failure.json"


def result_file(folder: Path, rank: int) -> Path:
    """The file with the pickled result of `rank`."""
    return folder / f"result-{rank}.pkl"


def main() -> int:
    """Runs the supervisor or a rank; returns its exit code."""
    arguments = sys.argv[1:]
    folder = Path(arguments[0])
    if len(arguments) == 1:
        return _be_rank(folder)
    return _supervise(folder, int(arguments[1]))


def _supervise(folder: Path, ranks: int) -> int:
    die_with_parent()

    def write(failure: Failure) -> None:
        (folder / FAILURE).write_text(json.dumps(failure._asdict()))

    command = [sys.executable, "-m", "launch.local.function_rank", str(folder)]
    return run_local(command, Elastic(ranks), on_failure=write)


def _be_rank(folder: Path) -> int:
    """Calls the function and writes its result."""
    try:
        function, args, kwargs = pickle.loads((folder / TASK).read_bytes())
        result = function(*args, **kwargs)
        _write_result(folder, result)
    except BaseException:
        print_line(traceback.format_exc().rstrip("\n"), sys.stderr)
        leave(1)  # an ordinary exit would wait for collectives that can no longer complete
    return 0


def _write_result(folder: Path, result: object) -> None:
    from . import pickling

    if "mxnet" in sys.modules:
        sys.modules["mxnet"].nd.waitall()  # collectives in flight at exit would kill the peers
    result_file(folder, int(os.environ["HOROVOD_RANK"])).write_bytes(pickling.dumps(result))


if __name__ == "__main__":
    run(main)
