"""The batch step of a Slurm job: runs `srun`, names a failed rank, requeues a job that has saved.

It needs only Python's standard library, because it runs outside of the ranks' container.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import time
from collections import deque
from datetime import datetime
from typing import Deque, Dict, List, Mapping, Optional, Sequence

from ..core import process
from ..core.arrivals import ENDED_BEFORE_INIT
from ..core.process import RECONNECT, START_SECONDS, say
from ..core.ranks import EXIT_SAVED
from .environment import expand_nodes
from .requeue import judge, parse_job, step_cancelled

_LABELLED = re.compile(rb"\s*(\d+): (.*)", re.DOTALL)  # srun --label
_NODE_LOST = re.compile(r"srun: error: Task launch for \S+ failed on node (\S+): (.+)")
_NODE_FAILED = re.compile(r"srun: error: Node failure on (\S+)")
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
_WAIT_OVER = re.compile(r"srun: First task exited (\d+)s ago")  # srun --wait
_HAD_ENDED = re.compile(r"srun: StepId=\S+ tasks? ([\d,-]+): exited")
_ABSENT = re.compile(f"launch: (.* {re.escape(ENDED_BEFORE_INIT)})")  # by rank 0's store
_STORE_GONE = "HTTP request failed"  # Horovod's words
_SAVED = f"Exited with exit code {EXIT_SAVED}"
_KILLED_BY_WARNING = ("Terminated", "User defined signal 1")  # strsignal's words
_REFUSED = re.compile("denied|disabled|Invalid job id|not installed")  # not the next time either
SUSPENDED = "ranks lost each other while the job was suspended; starting them again"
PAUSES = (1, 2, 4, 8, 15, 30)
"""Seconds before each further question to a controller that is too busy, or away, to answer."""


def run_job(srun: Sequence[str], warning_seconds: int, max_requeues: int) -> int:
    """Runs the `srun` command line of a batch job and returns the job's exit code.

    When the ranks were warned and have saved (exit code 85), the job is requeued unless it was
    cancelled or has been requeued `max_requeues` times. `warning_seconds` is how long before the
    time limit Slurm warns the ranks (`#SBATCH --signal`). Ranks that could not connect, or have
    lost each other while Slurm held them, are started again. Raises ValueError outside of a job.
    """
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        raise ValueError("slurm-job runs inside a batch job: python -m launch slurm submits one")
    restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
    say(f"job {env['SLURM_JOB_ID']} on {env.get('SLURM_JOB_NODELIST')}, restarts: {restarts}")
    for signum in process.WARNINGS:
        # Ranks get Slurm's signals themselves. Unlike SIG_IGN, a handler is not inherited by srun.
        signal.signal(signum, lambda signum, frame: None)
    # A batch script's --export=NONE is not meant for its srun: `setup` would not reach the ranks.
    begun: List[str] = []  # why ranks were started again
    while True:
        own = {"LAUNCH_TOKEN": secrets.token_hex(16), "LAUNCH_STEP": "0"}  # one step to `--resume`
        step = _Step(srun, {**env, "SLURM_EXPORT_ENV": "ALL", **own})
        code = step.wait()
        again = None if code in (0, EXIT_SAVED) else step.why_again()
        if not again or begun.count(again) == (1 if again == RECONNECT else max_requeues):
            break
        begun.append(again)
        say(again)
    if code not in (0, EXIT_SAVED):
        step.explain()
    if code == EXIT_SAVED or step.ended_by_warning():
        job_id = env["SLURM_JOB_ID"]
        try:
            job = parse_job(_scontrol("show", "job", "-o", job_id), job_id)
            now, saved = datetime.now(), code == EXIT_SAVED
            verdict = judge(
                job, step.cancelled, now, warning_seconds, restarts, max_requeues, saved
            )
            say(f"job {job_id}: {verdict.message}")
            if verdict.requeue:
                _scontrol("requeue", job.name)
        except (OSError, ValueError) as error:
            say(
                f"job {job_id} is not requeued: {error}; to continue it, `scontrol requeue "
                f"{job_id}` once Slurm answers, or submit it again"
            )
    return code


def _scontrol(*arguments: str) -> str:
    """What scontrol prints, asked again for a minute unless it refuses; OSError if it fails."""
    # A user's SLURM_TIME_FORMAT would leave the day out of times, or make words of them.
    env = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    for pause in (*PAUSES, 0):
        answer = process.run(["scontrol", *arguments], env=env)
        if answer.returncode == 0:
            return answer.stdout
        if _REFUSED.search(answer.stderr):
            break
        time.sleep(pause)
    raise OSError(f"scontrol {' '.join(arguments)} failed: {answer.stderr.strip()}")


class _Step:
    """A running `srun --label`, whose output is forwarded and analysed."""

    def __init__(self, srun: Sequence[str], env: Mapping[str, str]) -> None:
        self.cancelled: Optional[str] = None
        self._tails: Dict[int, Deque[str]] = {}
        self._endings: Dict[int, str] = {}  # of ranks that failed, in srun's order
        self._lost_node: Optional[str] = None
        self._wait_seconds: Optional[str] = None  # if srun --wait ended ranks
        self._ended_early = ""  # the other ranks, as `1,3-5`, if none had failed
        self._absent: Optional[str] = None  # names ranks that ended before hvd.init()
        self._began = time.monotonic()
        self._held = False
        self._process = subprocess.Popen(
            srun, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        # `--signal=B:USR1@60` and `scancel --batch --signal=USR1`; srun hands it on to the ranks.
        signal.signal(signal.SIGUSR1, lambda signum, _: self._process.send_signal(signum))

    def wait(self) -> int:
        for thread in process.drain(self._process, self._note):
            thread.join()
        return process.shell_exit_code(self._process.wait())

    def why_again(self) -> Optional[str]:
        """Whether ranks could not connect as they started, or as Slurm let them go on."""
        if time.monotonic() - self._began > START_SECONDS or self.cancelled is not None:
            return None
        if any(process.found_no_peer(list(tail)) for tail in self._tails.values()):
            return RECONNECT
        lost = self._endings and all(map(self._lacks_cause, self._endings))
        return SUSPENDED if self._held and lost else None

    def ended_by_warning(self) -> bool:
        """Whether SIGTERM or SIGUSR1 killed a rank, before it had installed its handlers."""
        return any(ending.endswith(_KILLED_BY_WARNING) for ending in self._endings.values())

    def explain(self) -> None:
        """Prints the node that was lost, or the rank that failed first with its last lines.

        Or those that ended without failing, but so long before the others that srun ended these.
        """
        if self._lost_node:
            say(self._lost_node)
            return
        if self._ended_early:
            say(
                f"rank {self._ended_early} ended without an error {self._wait_seconds} s before "
                "srun --wait ended the others; straggler_seconds in the site file gives them longer"
            )
            return
        rank = process.first_cause(list(self._endings), self._lacks_cause)
        if absent := self._absent_ranks(rank):
            say(absent)
            return
        if rank is None:
            say("srun failed before any rank did; its message is above")
            return
        last_lines = list(self._tails.get(rank, ()))
        process.report_failure(process.Failure(rank, self._endings[rank], last_lines), then="")

    def _absent_ranks(self, rank: Optional[int]) -> Optional[str]:
        """Names those for which `rank`, the first that failed, waited in vain in `hvd.init()`."""
        if rank is None or not self._lacks_cause(rank):
            return None
        if 0 not in self._endings and any(
            _STORE_GONE in line for line in self._tails.get(rank, [])
        ):
            return f"rank 0 {ENDED_BEFORE_INIT}"
        return self._absent

    def _lacks_cause(self, rank: int) -> bool:
        exited = "Exited with exit code" in self._endings[rank]
        return process.lacks_cause(exited, list(self._tails.get(rank, [])))

    def _note(self, line: bytes) -> bytes:
        """Analyses a line of output; returns it as it should appear in the log.

        Rank 0's lines get no prefix, so that programs can parse them.
        """
        labelled = _LABELLED.fullmatch(line)
        text = (labelled[2] if labelled else line).decode(errors="replace").rstrip("\n")
        self._note_events(text)
        if not labelled:
            return line
        rank = int(labelled[1])
        if not text.startswith("slurmstepd-"):  # Slurm's own line, not the rank's
            self._tails.setdefault(rank, deque(maxlen=process.TAIL_LINES)).append(text)
        return labelled[2] if rank == 0 else b"[%d] %s" % (rank, labelled[2])

    def _note_events(self, text: str) -> None:
        """Notes what srun, slurmstepd or the ranks' store tells of in a line."""
        if (reason := step_cancelled(text)) is not None:
            self.cancelled = reason
        if text == "srun: got SIGCONT":  # Gloo's clock has not stood still
            self._began, self._held = time.monotonic(), True
        if lost := _NODE_LOST.match(text):
            self._lost_node = f"{lost[1]} could not start its ranks: {lost[2]}"
        if failed := _NODE_FAILED.match(text):
            self._lost_node = f"{failed[1]} was lost while its ranks ran; Slurm requeues the job"
        if wait_over := _WAIT_OVER.match(text):
            self._wait_seconds = wait_over[1]
        if (had_ended := _HAD_ENDED.match(text)) and self._wait_seconds and not self._endings:
            self._ended_early = had_ended[1]
        if (ended := _TASK_ENDED.match(text)) and _SAVED not in ended[3]:
            how = f"on {ended[1]}: {ended[3]}"
            if self._wait_seconds and ended[3] == "Killed":
                how += f" by srun --wait, {self._wait_seconds} s after the first rank had ended"
            for rank in expand_nodes(f"[{ended[2]}]"):  # 1,3-5
                self._endings.setdefault(int(rank), how)
        if absent := _ABSENT.fullmatch(text):
            self._absent = absent[1]
