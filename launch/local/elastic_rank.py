"""A rank under elastic horovodrun, which restarts its command when other ranks are lost or join.

    horovodrun --min-np 1 ... --host-discovery-script FILE python -m launch elastic-rank -- COMMAND

horovodrun keeps the processes of the surviving ranks, notifies rank 0 of host changes, and expects
all ranks to initialise again. Horovod does not support that for MXNet: a process that lost a peer
usually aborts within Gloo, and sometimes hangs. So the process that horovodrun keeps is this one;
the rank itself is a child, started afresh for each rendezvous, and resumes from what it has saved.
"""

from __future__ import annotations

import http.client
import os
import signal
import threading
from typing import List, Sequence

from horovod.runner.elastic.worker import WorkerNotificationManager

from ..core.job import FORWARDED, Events, Job, Outcome
from ..core.process import die_with_parent, say
from ..core.rank_process import RankProcess
from ..core.ranks import EXIT_SAVED
from ..core.streams import USER_ERROR

SAVE_SECONDS = 60.0
"""Time between SIGTERM, when the hosts have changed, and SIGKILL."""
PLACE_SECONDS = 600.0
"""Time for horovodrun to assign the new rank; it waits for all other ranks first."""
_PLACE = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


class _HostChanges(threading.Event):
    """Is set by horovodrun's notifications of host changes."""

    def on_hosts_updated(self, timestamp: int, result: object) -> None:
        self.set()


def run_elastic_rank(command: Sequence[str]) -> int:
    """Runs `command` as a rank while it has a place in the job; returns its last exit code."""
    if os.environ.get("HOROVOD_ELASTIC") != "1":
        raise ValueError(
            "elastic-rank is for the ranks of `horovodrun --min-np N --host-discovery-script FILE`"
        )
    events = Events()
    for signum in (signal.SIGINT, *FORWARDED):
        signal.signal(signum, events.on_signal)
    host_changes, manager = _HostChanges(), WorkerNotificationManager()
    manager.register_listener(host_changes)
    manager.init()
    environment = dict(os.environ)
    del environment["HOROVOD_ELASTIC"]  # to the command this is an ordinary job
    # horovodrun keeps the same store for the whole job.
    store = (environment[f"HOROVOD_GLOO_RENDEZVOUS_{part}"] for part in ("ADDR", "PORT"))
    environment["LAUNCH_ID"] = ":".join(store)
    while True:
        rank = int(environment["HOROVOD_RANK"])
        job = Job(events, SAVE_SECONDS, host_changes.is_set)
        child = RankProcess(rank, command, environment, die_with_parent, prefix="")
        job.ranks.append(child)
        outcome = job.supervise()
        job.kill()
        host_changes.clear()  # those up to now are in the new place
        if not _should_restart(outcome, child):
            return outcome.exit_code
        place = _new_place()
        if place[0] == "-1":
            return 0  # this host is no longer one of the job's
        environment.update({f"HOROVOD_{name}": value for name, value in zip(_PLACE, place)})


def _should_restart(outcome: Outcome, child: RankProcess) -> bool:
    """Whether the child ended because of its peers, or to be restarted; own failures are final."""
    if outcome.terminated or outcome.exit_code in (0, USER_ERROR):
        return False
    if outcome.outdated or outcome.exit_code == EXIT_SAVED or child.lacks_cause():
        return True
    if outcome.failure:
        say(f"rank {child.rank} {outcome.failure.cause}; horovodrun continues without its host")
    return False


def _new_place() -> List[str]:
    """The values of `_PLACE`, from horovodrun's store, once all previous ranks have reported."""
    env = os.environ
    address, port = env["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(env["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    slot = f"{env['HOROVOD_HOSTNAME']}:{env['HOROVOD_LOCAL_RANK']}"
    connection = http.client.HTTPConnection(address, port, timeout=PLACE_SECONDS)
    try:
        connection.request("GET", f"/rank_and_size/{slot}")
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise OSError(f"{answer.status} {answer.reason}")
        return answer.read().decode().split(",")
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"horovodrun has no new rank for {slot}: {error!r}") from error
    finally:
        connection.close()
