"""Runs a Python function on ranks of this machine: `launch.run(train, ranks=2)`.

For notebooks and scripts. The function is pickled by cloudpickle, as in `horovod.run`, so it may be
defined in a cell. Its ranks are those of `python -m launch local`: they divide the cores, each line
names its rank, and a rank that fails is reported with its last output. `horovod.run` itself is not
used because it does not restore the signal handlers that it replaces, after which a notebook cell
cannot be interrupted, and because it serves pickles on an open port; here they pass through a
private folder.

`python -m launch.local.function FOLDER RANKS` supervises the ranks; without RANKS it is one. The
pickled function and the results are files in FOLDER.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import partial
from numbers import Integral
from pathlib import Path
from types import FrameType
from typing import Any, Callable, List, Mapping, Optional, Sequence

from ..core.arrivals import ranks_text
from ..core.job import FORWARDED
from ..core.process import Failure, die_with_parent
from ..core.streams import leave, print_line
from ..core.streams import run as run_program
from . import pickling
from .elastic import Elastic
from .local import run_local

TASK = "task.pkl"
FAILURE = "failure.json"
RESULT = "result-{}.pkl"  # of a rank
RANK = [sys.executable, "-m", "launch.local.function"]


class RankError(RuntimeError):
    """The function failed on a rank: which one, how it ended, and its last output."""

    def __init__(self, how: str, last_lines: Sequence[str] = ()):
        said = "; its last lines:" if last_lines else ""
        super().__init__("\n    ".join([how + said, *last_lines]))
        self._in_short = ": ".join([how, *last_lines[-1:]])

    def _render_traceback_(self) -> List[str]:
        """Shown by IPython instead of a traceback, whose frames in this process would not help."""
        return [f"RankError: {self._in_short}"]


def run(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    ranks: int = 2,
    on_line: Optional[Callable[[str], Any]] = None,
) -> List[Any]:
    """Calls `function(*args, **kwargs)` on `ranks` ranks; returns the results in rank order.

    Each rank is a separate process, in which `horovod.init()` and `trainer.fit` find the others. It
    gets copies of the function, its arguments and the globals it uses, and sends back a copy of its
    result; what a module defines is imported anew there, from its file. A Gluon net can be among
    them; one that was compiled is compiled anew. Nets and arrays arrive on the CPU; `trainer.fit`
    moves its net. Output of the ranks is printed as it comes, or passed to `on_line` line by line,
    in this process; `trainer.notebook.LiveCurves` draws curves from it. An interrupt (ctrl-C, or
    Jupyter's stop button) ends all ranks; `trainer.fit` saves first. So it does after SIGTERM,
    SIGUSR1 or SIGHUP, which then end this process.

    Raises:
        ValueError: something cannot be pickled, or is not of its kind, `ranks` is not a positive
            number, or this process is itself a rank.
        RankError: a rank failed, and the others were terminated; or ended within the function.
        RuntimeError: the ranks could not be started.
        KeyboardInterrupt: after an interrupt, once all ranks have ended.
    """
    _check(function, args, ranks)
    try:
        task = pickling.dumps((function, tuple(args), dict(kwargs or {})))
    except Exception as error:  # __reduce__ of an object may raise anything
        raise ValueError(
            f"{getattr(function, '__name__', function)} cannot be sent to the ranks: {error}; "
            "make what it needs inside of it, or hand it over as plain arguments"
        ) from error
    with tempfile.TemporaryDirectory(prefix="launch-") as name:
        folder = Path(name)
        (folder / TASK).write_bytes(task)
        # In a notebook nothing but `print` reaches the cell.
        code = _supervise(folder, int(ranks), on_line or partial(print_line, raw=True))
        if (folder / FAILURE).exists():
            failure = json.loads((folder / FAILURE).read_text())
            how = f"rank {failure['rank']} {failure['cause']}"
            raise RankError(how, failure["last_lines"])
        if code != 0:
            raise RuntimeError(f"the ranks could not be started (exit code {code}); see above")
        results = [folder / RESULT.format(rank) for rank in range(ranks)]
        lost = [rank for rank, result in enumerate(results) if not result.exists()]
        if lost:
            raise RankError(f"{ranks_text(lost)} ended before the function returned (os._exit?)")
        return [pickle.loads(result.read_bytes()) for result in results]


def _check(function: Any, args: Any, ranks: Any) -> None:
    """Raises ValueError where a parameter is not of its kind, or this process is a rank."""
    if isinstance(ranks, bool) or not isinstance(ranks, Integral) or ranks < 1:
        raise ValueError(f"ranks is {ranks!r}; it must be a whole number from 1")
    if not callable(function):
        raise ValueError(f"{function!r} is no function; give its name alone, and its args apart")
    # A net of layers is a sequence too: each layer would become an argument.
    if not isinstance(args, (tuple, list)):
        raise ValueError(
            f"args is a {type(args).__name__}; it must be the function's arguments in a tuple, "
            "e.g. (net,)"
        )
    if "HOROVOD_RANK" in os.environ:
        raise ValueError(
            f"this process is rank {os.environ['HOROVOD_RANK']} of a job already; "
            "call launch.run where no launcher has been before"
        )


def _supervise(folder: Path, ranks: int, on_line: Callable[[str], Any]) -> int:
    """Passes the ranks' output to `on_line` until they have ended; returns the exit code.

    A separate process starts and supervises them, because this one may have threads, with which
    forking is unsafe, and should keep its signal handlers.
    """
    # The ranks must find the modules that the function uses where this process does.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    supervisor = subprocess.Popen(
        [*RANK, str(folder), str(ranks)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # interrupts are forwarded by this process, once
    )
    assert supervisor.stdout is not None
    heard: List[int] = []

    def forward(signum: int, frame: Optional[FrameType] = None) -> None:
        heard.append(signum)
        supervisor.send_signal(signum)

    # What would end this process, and so the ranks before they could save; in threads as it is.
    main = threading.current_thread() is threading.main_thread()
    known = (*FORWARDED, signal.SIGHUP) if main else ()
    ends = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, forward)
    try:
        while supervisor.poll() is None:
            try:
                for line in supervisor.stdout:
                    on_line(line.decode(errors="replace").rstrip("\n"))
                supervisor.wait()
            except KeyboardInterrupt:
                forward(signal.SIGINT)
    finally:
        supervisor.kill()  # the ranks die with it
        supervisor.wait()
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
    if signal.SIGINT in heard:
        raise KeyboardInterrupt("all ranks have ended")
    for signum in heard:
        shutil.rmtree(folder, ignore_errors=True)  # nothing else does, as this process ends at once
        os.kill(os.getpid(), signum)
    return supervisor.returncode


# -------------------------------------------------------------- the processes behind it


def main() -> int:
    """Runs the supervisor or a rank; returns its exit code."""
    folder, ranks = Path(sys.argv[1]), sys.argv[2:]
    if not ranks:
        return _be_rank(folder)
    die_with_parent()

    def write(failure: Failure) -> None:
        (folder / FAILURE).write_text(json.dumps(failure._asdict()))

    return run_local([*RANK, str(folder)], Elastic(int(ranks[0])), on_failure=write)


def _be_rank(folder: Path) -> int:
    """Calls the function and writes its result."""
    os.environ.pop("LAUNCH_ID")  # nothing starts these ranks again: trainer.fit returns if stopped
    try:
        function, args, kwargs = pickle.loads((folder / TASK).read_bytes())
        result = function(*args, **kwargs)
        if "mxnet" in sys.modules:
            sys.modules["mxnet"].nd.waitall()  # collectives in flight at exit would kill the peers
        try:
            pickled = pickling.dumps(result)
        except Exception as error:
            raise TypeError(f"what it returned cannot be sent on: {error}") from None
        (folder / RESULT.format(os.environ["HOROVOD_RANK"])).write_bytes(pickled)
    except BaseException:
        print_line(traceback.format_exc().rstrip("\n"), sys.stderr)
        leave(1)  # an ordinary exit would wait for collectives that can no longer complete
    return 0


if __name__ == "__main__":
    run_program(main)
