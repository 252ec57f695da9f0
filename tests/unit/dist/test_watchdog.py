"""A rank that hangs ends itself and shows its stacks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time

from trainer.dist.watchdog import EXIT_CODE, Watchdog

STUCK = """
import threading, time
from trainer.dist.watchdog import Watchdog

def waits_for_a_peer():
    threading.Event().wait()

with Watchdog(1.0, "rank 5 on a") as watchdog:
    for step in range(3):
        watchdog.beat(f"step {step}")
        time.sleep(0.05)
    waits_for_a_peer()
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_stuck_rank_exits_with_its_name_and_its_stacks():
    done = run(STUCK)
    assert done.returncode == EXIT_CODE == 70
    first = done.stderr.splitlines()[0]
    for part in ("rank 5 on a", "step 2", "train.watchdog_seconds is 1"):
        assert part in first
    # It counts half a second a look at the most, however slow the machine is.
    assert re.search("stood still for [12] s", first)
    assert "waits_for_a_peer" in done.stderr
    assert done.stdout == ""


def test_rank_that_is_busy_for_ever_is_seen():
    done = run(STUCK.replace("threading.Event().wait()", "while True: pass"))
    assert done.returncode == EXIT_CODE
    assert "waits_for_a_peer" in done.stderr


def test_rank_that_never_began_is_seen():
    done = run(
        "import time\n"
        "from trainer.dist.watchdog import Watchdog\n"
        "with Watchdog(0.2, 'rank 0 on a'): time.sleep(60)"
    )
    assert done.returncode == EXIT_CODE
    assert "starting" in done.stderr


def test_rank_that_moves_is_left_alone():
    done = run(
        "import time\n"
        "from trainer.dist.watchdog import Watchdog\n"
        "with Watchdog(2.0, 'rank 0 on a') as watchdog:\n"
        "    for step in range(25):\n"
        "        watchdog.beat(f'step {step}')\n"
        "        time.sleep(0.1)\n"
        "print('done')"
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_time_in_which_the_process_is_stopped_does_not_count():
    """Ctrl-Z and fg, or a job that Slurm suspends and resumes."""
    code = (
        "from trainer.dist.watchdog import Watchdog\n"
        "with Watchdog(2.0, 'rank 0 on a'):\n"
        "    print('begun', flush=True)\n"
        "    input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.3)  # the watchdog looks first
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def test_leaving_ends_the_thread():
    with Watchdog(3600.0, "rank 0 on a"):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
