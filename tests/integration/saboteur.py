"""The trainer with faults in it: `python -m tests.integration.saboteur FOLDER ARGUMENTS...`.

FOLDER/faults.json lists them. They strike one after the other, each once, the next one only in
ranks that were started after the one before. Rank 0 writes the time and number of every step, and
how many faults had struck when it was started, to FOLDER/steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM", "abort": "SIGABRT"}


class Fault(NamedTuple):
    """What happens to one rank, where."""

    how: str  # one of SIGNALS; crash (an exception), hang, fill (the disk that the run is on)
    place: str  # start (of the process), step, save (rank 0's), evaluation
    rank: int  # modulo the number of ranks
    number: int  # the step before which it is due; at the start: milliseconds
    delay: float  # seconds from there, for signals


class Saboteur:
    """Strikes this process with the fault that is next, if it is meant."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rank = int(os.environ.get("HOROVOD_RANK", 0))
        self._step = 0
        faults = [Fault(**fault) for fault in json.loads((folder / "faults.json").read_text())]
        self._number = len(list(folder.glob("struck-*")))
        self._struck = self._number + (folder / "outside").exists()
        self._fault: Optional[Fault] = None
        if self._number < len(faults):
            fault = faults[self._number]
            if fault.rank % int(os.environ.get("HOROVOD_SIZE", 1)) == self._rank:
                self._fault = fault
        self.reach("start")

    def reach(self, place: str, step: Optional[int] = None) -> None:
        """This rank is at `place` now."""
        self._step = self._step if step is None else step
        fault = self._fault
        if fault is None or fault.place != place:
            return
        if place != "start" and self._step < fault.number:
            return
        self._fault = None
        if fault.how in SIGNALS:
            delay = fault.number / 1000 if place == "start" else fault.delay
            threading.Timer(delay, self._strike, (fault,)).start()
        else:
            self._strike(fault)

    def done(self, step: int) -> None:
        """A step is done on all ranks."""
        if self._rank == 0:
            with open(self._folder / "steps", "a") as file:
                file.write(f"{time.time()} {step} {self._struck}\n")

    def _strike(self, fault: Fault) -> None:
        (self._folder / f"struck-{self._number}").write_text(f"{time.time()} {self._step}")
        if fault.how in SIGNALS:
            os.kill(os.getpid(), getattr(signal, SIGNALS[fault.how]))
        elif fault.how == "hang":
            time.sleep(3600)
        elif fault.how == "fill":
            self._fill(self._folder / "disk" / "filler")
        else:
            raise RuntimeError(f"crashed as asked, at {fault.place}")

    def _fill(self, filler: Path) -> None:
        try:
            with open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:  # full now
            pass


def _before(owner: Any, name: str, hook: Callable[..., None]) -> None:
    """Have `hook` called with its arguments before `owner.name` is."""
    original = getattr(owner, name)

    def hooked(*arguments: Any, **options: Any) -> Any:
        hook(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, hooked)


def main() -> None:
    """Be the trainer, with hooks."""
    saboteur = Saboteur(Path(sys.argv[1]))
    sys.argv = ["trainer", *sys.argv[2:]]
    from trainer.checkpoint import files
    from trainer.cli.main import run
    from trainer.report.report import Report
    from trainer.run import evaluator, loop

    _before(loop, "set_lr", lambda trainer, config, step, *_: saboteur.reach("step", step))
    _before(evaluator, "evaluate", lambda *_: saboteur.reach("evaluation"))
    _before(files, "_put_in_place", lambda *_: saboteur.reach("save"))
    _before(Report, "step", lambda self, step: saboteur.done(step))
    run()


if __name__ == "__main__":
    main()
