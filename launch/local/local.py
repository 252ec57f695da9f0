"""Runs a job on this machine: starts its ranks, ends them together, and restarts them.

The rendezvous store and the environment variables are horovodrun's (launch/core/rendezvous.py). The
supervision is our own, because horovodrun interleaves the ranks' output, does not repeat the cause
of a failure and gives ranks a fixed five seconds to save.
"""

from __future__ import annotations

import secrets
import signal
from typing import Callable, Sequence

from ..core.job import FORWARDED, Events, Job, Outcome
from ..core.network import LOOPBACK, interface_towards, make_own_name_lead_to
from ..core.process import START_SECONDS, Failure, report_failure, say
from ..core.rank_process import RankProcess
from ..core.ranks import cores_per_rank, facts_on_one_host, rank_environment
from ..core.rendezvous import START_TIMEOUT_SECONDS, Rendezvous
from .elastic import Elastic, Slots, TerminatedError, visible_devices
from .watcher import watched

KILL_AFTER_SECONDS = 10.0


def run_local(
    command: Sequence[str],
    elastic: Elastic,
    quiet: bool = False,
    kill_after: float = KILL_AFTER_SECONDS,
    start_timeout: float = START_TIMEOUT_SECONDS,
    on_failure: Callable[[Failure], None] = report_failure,
) -> int:
    """Runs `command` as the ranks of this machine and returns the job's exit code.

    The exit code is 0, that of the first failing rank, 85 if the ranks were warned and saved, or
    130 after ctrl-C. When a rank fails, the others get SIGTERM, and SIGKILL `kill_after` seconds
    later; `elastic` decides whether, and on how many ranks, the command is restarted. SIGTERM and
    SIGUSR1 are forwarded to all ranks; a closed terminal counts as SIGTERM. With `quiet` only rank
    0 has the terminal; otherwise each line is prefixed with its rank. `on_failure` is called with
    the failure that ended the job.
    """
    interface = interface_towards(LOOPBACK)
    make_own_name_lead_to(LOOPBACK, interface, several_nodes=False)
    launch_id = secrets.token_hex(16)
    events = Events()
    known = (signal.SIGINT, signal.SIGHUP)  # ignored by a script's background job, and by nohup
    heard = [*FORWARDED, *(s for s in known if signal.getsignal(s) is not signal.SIG_IGN)]
    previous = {s: signal.signal(s, events.on_signal) for s in heard}
    try:
        slots = elastic.first_slots(events)
        with watched(launch_id):
            while slots:
                job = Job(events, kill_after, elastic.outdated)
                outcome = _run_once(job, command, slots, interface, launch_id, quiet, start_timeout)
                slots = elastic.next_slots(outcome, events)
        if outcome.failure:
            on_failure(outcome.failure)
        return outcome.exit_code
    except TerminatedError as error:
        say(str(error))
        return error.exit_code
    finally:
        elastic.close()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _run_once(
    job: Job,
    command: Sequence[str],
    slots: Slots,
    interface: str,
    launch_id: str,
    quiet: bool,
    start_timeout: float,
) -> Outcome:
    """Starts one rank for each slot and waits until all have ended."""
    world_size = len(slots)
    rendezvous = Rendezvous(
        LOOPBACK, world_size, secrets.token_hex(16), say, start_timeout=start_timeout
    )
    devices, cores = visible_devices(slots), cores_per_rank(world_size)
    store = rendezvous.endpoint.environment()
    try:
        for rank in range(world_size):
            facts = facts_on_one_host(rank, world_size)
            environment = rank_environment(facts, store, interface, cores, launch_id)
            if devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = devices
            inherit, prefix = quiet and rank == 0, None if quiet else f"[{rank}] "
            job.ranks.append(RankProcess(rank, command, environment, None, prefix, inherit))
        # Threads start only now: a fork of a process with threads may deadlock.
        rendezvous.serve_in_thread()
        outcome = job.supervise(rendezvous.arrivals.awaited)
        since_all_came = rendezvous.arrivals.seconds_since_complete("global")
        return outcome._replace(unconnected=outcome.unconnected and since_all_came < START_SECONDS)
    finally:
        job.kill()
        rendezvous.close()
