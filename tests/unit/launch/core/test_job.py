"""Ranks are ended together, those that do not listen by SIGKILL; warnings reach them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

from launch.core.job import Events, Job
from launch.core.rank_process import RankProcess

# Says that it is ready, for the other to go on; it ends by itself after ten seconds.
DEAF = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "os.write({}, b'x'); time.sleep(10)"
)
FAILS = "import os; os.read({}, 1); os._exit(3)"


def job_of(codes: List[str], kill_after: float) -> Job:
    job = Job(Events(), kill_after)
    for rank, code in enumerate(codes):
        command = [sys.executable, "-c", code]
        job.ranks.append(RankProcess(rank, command, dict(os.environ), None, None, True))
    return job


def test_a_rank_that_does_not_listen_gets_sigkill_after_the_time_it_has(tmp_path) -> None:
    pipe = tmp_path / "ready"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    opened = f"os.open({str(pipe)!r}, os.O_RDWR)"
    job = job_of([DEAF.format(opened), FAILS.format(opened)], kill_after=0.1)
    try:
        outcome = job.supervise()
    finally:
        job.kill()
        os.close(end)
    assert job.ranks[0].process.returncode == -signal.SIGKILL
    assert outcome.failure is not None
    assert outcome.failure.rank == 0
    assert outcome.failure.cause == "answered neither its peers nor SIGTERM for 0.1 s: SIGKILL"


def test_a_rank_that_has_the_terminal_is_named_before_one_that_says_it_lost_a_peer() -> None:
    """Under --quiet: what rank 0 has raised is on the terminal alone."""
    code = [
        "import sys, time; time.sleep(0.5); sys.exit(1)",
        "import sys; sys.exit('Horovod has been shut down')",
    ]
    job = Job(Events(), kill_after=10)
    for rank in (0, 1):
        command = [sys.executable, "-c", code[rank]]
        environment = dict(os.environ)
        job.ranks.append(RankProcess(rank, command, environment, None, None, rank == 0))
    outcome = job.supervise()
    assert outcome.failure is not None
    assert outcome.failure.rank == 0


def test_a_rank_that_has_the_terminal_and_aborts_may_not_have_found_its_peers() -> None:
    """Under --quiet: Gloo's words are on the terminal alone."""
    for inherits in (True, False):
        job = Job(Events(), kill_after=10)
        command = [sys.executable, "-c", "import os; os.abort()"]
        job.ranks.append(RankProcess(0, command, dict(os.environ), None, None, inherits))
        assert job.supervise().unconnected == inherits


BAR = """
import os, sys, time
for percent in range(100):
    sys.stderr.write(f"\\r{percent}%")
    sys.stderr.flush()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
sys.stderr.write("\\r100%\\r\\nafter\\n" + "x" * 70000)
sys.exit(3)
"""


def test_a_progress_bar_is_shown_as_it_moves_and_is_one_of_the_last_lines(tmp_path) -> None:
    """It ends its lines by carriage returns, of which a read may end between that and the next."""
    shown = tmp_path / "shown"
    rank = [sys.executable, "-c", BAR, str(shown)]
    command = [sys.executable, "-m", "launch", "local", "-n", "1", "--", *rank]
    job = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert job.stderr is not None
    said = b""
    while b"[0] 98%\r" not in said:  # 99% might be half of a number
        said += os.read(job.stderr.fileno(), 2**16)
    shown.touch()
    said += job.stderr.read()
    bar, _, rest = said.partition(b"[0] 100%")
    assert rest.startswith(b"\r\n[0] after\n[0] xxx")
    assert bar.split(b"\r") == [*(b"[0] %d%%" % percent for percent in range(100)), b""]
    assert b"last lines of rank 0, which failed:\n    100%\n    after\n    xxx" in rest
    assert job.wait() == 3


WARNS_ITS_LAUNCHER = """
import os, signal, sys, time
signal.signal(signal.{name}, lambda *_: sys.exit(85))
os.kill(os.getppid(), signal.{name})
time.sleep(10)
"""


def test_local_forwards_the_warnings_of_slurm_and_of_shells() -> None:
    for name in ("SIGUSR1", "SIGTERM"):
        rank = [sys.executable, "-c", WARNS_ITS_LAUNCHER.format(name=name)]
        command = [sys.executable, "-m", "launch", "local", "-n", "1", "--", *rank]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 85, done.stderr


SAVES_BEHIND_A_SHELL = """
import os, signal, sys, time

def save(*_):
    time.sleep(2.5)
    open(sys.argv[2], "w").close()
    sys.exit(85)

signal.signal(signal.SIGTERM, save)
os.kill(int(sys.argv[1]), signal.{name})
time.sleep(20)
"""


@pytest.mark.parametrize(("name", "seconds"), [("SIGTERM", 20), ("SIGINT", 20), ("SIGINT", 1)])
def test_what_a_shell_has_started_is_given_as_long_as_a_rank(
    name: str, seconds: int, tmp_path: Path
) -> None:
    """The shell, which the same signal reaches, ends at once."""
    saved = tmp_path / "saved"
    python = shlex.join([sys.executable, "-c", SAVES_BEHIND_A_SHELL.format(name=name)])
    rank = ["bash", "-c", f"{python} $PPID {saved}; exit $?"]
    options = ["-n", "1", "--kill-after", str(seconds), "--"]
    command = [sys.executable, "-m", "launch", "local", *options, *rank]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (143 if name == "SIGTERM" else 130), done.stderr
    assert saved.exists() == (seconds > 1)
    assert ("rank 0 had not ended and got SIGKILL" in done.stderr) == (seconds == 1)


def test_an_interrupt_is_ignored_in_what_a_script_has_started_in_the_background() -> None:
    """Where the shell has it ignored, it is meant for what is in the foreground."""
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5)"
    rank = shlex.join([sys.executable, "-m", "launch", "local", "-n", "1", "--", "python"])
    script = f"trap '' INT; {rank} -c '{code}'"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
