"""What strikes a trial (chaos.py) from outside; each returns the exit code and what was said."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict

import mxnet as mx
import numpy as np
import psutil

from trainer import checkpoint

from . import hosts
from .chaos_jobs import (
    ENVIRONMENT,
    LAST,
    TOLD,
    Trial,
    begin,
    command,
    end,
    end_all,
    job,
    note,
    wait_for_step,
)
from .commands import ROOT, environment

RANKS_OF_HOSTS = (2, 2)


def _checkpoints(output: Path) -> Path:
    return output / "default" / "checkpoints"


def damage(trial: Trial, folder: Path, output: Path) -> Any:
    """All processes are killed, and one byte of the newest checkpoint is turned."""
    chance = random.Random(trial.number)

    def turn(newest: Path) -> None:
        path = chance.choice(sorted(newest.iterdir()))
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 + chance.randrange(255)
        path.write_bytes(content)

    return _damaged(trial, folder, output, turn)


def sealed_damage(trial: Trial, folder: Path, output: Path) -> Any:
    """The same, of what the manifest does not show, because it is made right again."""

    def spoil(newest: Path) -> None:
        how = trial.number // 2 % 4
        file = newest / (checkpoint.PARAMETERS if how == 0 else checkpoint.OPTIMIZER)
        arrays = mx.nd.load(str(file))
        name = random.Random(trial.number).choice(sorted(arrays))
        if how < 2:
            arrays[name][:] = np.nan
        else:
            del arrays[name]
        mx.nd.save(str(file), arrays or {"none": mx.nd.zeros(1)})
        if how == 3:
            (newest / checkpoint.STATE).write_text('{"format": 99}')
        sums = json.loads((newest / checkpoint.MANIFEST).read_text())
        for named in sums:
            sums[named] = hashlib.sha256((newest / named).read_bytes()).hexdigest()
        (newest / checkpoint.MANIFEST).write_text(json.dumps(sums))

    return _damaged(trial, folder, output, spoil)


def _damaged(trial: Trial, folder: Path, output: Path, spoil: Callable[[Path], None]) -> Any:
    begun = begin(trial, folder, output)
    try:
        wait_for_step(folder, 8 + trial.step // 2)  # so that two have been written
        note(folder)
    finally:
        begun.kill()
        begun.communicate()
    newest = checkpoint.find_latest(_checkpoints(output), print)
    assert newest is not None
    spoil(newest)
    code, said = end(begin(trial, folder, output))
    assert "using the checkpoint before it" in said, said
    return code, said


def kill_launcher(trial: Trial, folder: Path, output: Path) -> Any:
    """Its ranks, each behind a shell, must end too, or they would hold the lock."""
    begun = begin(trial, folder, output)
    wait_for_step(folder, trial.step)
    family = psutil.Process(begun.pid).children(recursive=True)
    note(folder)
    begun.kill()
    begun.communicate()
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive and len(gone) > 2 * trial.ranks, alive
    return end(begin(trial, folder, output))


def remove_folder(trial: Trial, folder: Path, output: Path) -> Any:
    """The run goes on, says so, and saves what is left of it."""
    begun = begin(trial, folder, output)
    wait_for_step(folder, min(trial.step, LAST - 8))  # a save must follow
    note(folder)
    (output / "default").rename(output / "gone")
    if trial.number % 2:
        shutil.rmtree(output / "gone")
    code, said = end(begun)
    assert code or "was removed or renamed" in said, said
    return code, said


def second_launch(trial: Trial, folder: Path, output: Path) -> Any:
    """Of the same name: it is refused, and the first one is not disturbed."""
    begun = begin(trial, folder, output)
    wait_for_step(folder, 1)
    code, said = end(begin(trial, folder, output))
    assert code == 2 and "another run is using" in said, said
    return end(begun)


def close_stdout(trial: Trial, folder: Path, output: Path) -> Any:
    """As `| head` does: lines are lost, and nothing else."""
    with open(folder / "stderr", "w+") as stderr:
        begun = subprocess.Popen(
            job(trial, folder, output),
            cwd=ROOT,
            env={**environment(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        wait_for_step(folder, trial.step)
        note(folder)
        assert begun.stdout is not None
        begun.stdout.close()
        begun.stdout = None
        code, _ = end(begun)
        stderr.seek(0)
        return code, stderr.read()


def cut(trial: Trial, folder: Path, output: Path) -> Any:
    """Ranks on hosts of their own, of which one loses its cable: for good, or for a second."""
    rank = command(folder, output)
    with hosts.Hosts(trial.ranks, folder) as made:
        ranks = hosts.start_ranks(made, (1,) * trial.ranks, rank, ENVIRONMENT)
        wait_for_step(folder, trial.step)
        lost = made.names[trial.step % trial.ranks]
        note(folder)
        made.cut(lost)
        if trial.kind == "short cut":
            time.sleep(1.0)
            made.mend(lost)
        codes, said = end_all(ranks)
    assert all(codes) or trial.kind == "short cut", said
    return max(codes), said


def strike_host(trial: Trial, folder: Path, output: Path) -> Any:
    """One of two hosts with two ranks each: cut off, stopped, or its first rank killed."""
    with hosts.Hosts(len(RANKS_OF_HOSTS), folder) as made:
        ranks = hosts.start_ranks(made, RANKS_OF_HOSTS, command(folder, output), ENVIRONMENT)
        wait_for_step(folder, trial.step)
        lost = trial.step % len(RANKS_OF_HOSTS)
        name, others = made.names[lost], ranks[:2] if lost else ranks[2:]
        note(folder)
        if trial.kind == "host cut":
            made.cut(name)
        elif trial.kind == "host stopped":
            made.signal(name, signal.SIGSTOP)
        else:
            ranks[2 * lost].kill()
        codes, said = end_all(others)
        if trial.kind == "host stopped":
            made.kill(name)
        own, more = end_all([rank for rank in ranks if rank not in others])
    assert all([*codes, *own]) and TOLD.search(said), said + more
    return max(codes), said + more


FROM_OUTSIDE: Dict[str, Callable[[Trial, Path, Path], Any]] = {
    "damage": damage,
    "sealed damage": sealed_damage,
    "cut": cut,
    "short cut": cut,
    "kill launcher": kill_launcher,
    "remove folder": remove_folder,
    "second launch": second_launch,
    "close stdout": close_stdout,
    "host cut": strike_host,
    "host stopped": strike_host,
    "kill leader": strike_host,
}
