"""Turns a task of `srun` into a rank.

Task 0 serves the store (core/rendezvous.py) in a child process; every task finds it, checks in,
waits until all have, and then executes the user's command. Until all ranks are in `hvd.init()`, a
child of each keeps a connection to the store, which is closed when the rank ends.
"""

from __future__ import annotations

import http.client
import itertools
import os
import re
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Callable, Dict, List, Mapping, NoReturn, Sequence, Tuple

from ..core import network
from ..core.arrivals import CHECK_IN
from ..core.private import user_secret
from ..core.process import WARNINGS, die_with_parent, run, say
from ..core.ranks import RankFacts, cores_of_task, count_of, rank_environment
from ..core.rendezvous import ALIVE, NOTICE_SECONDS, Endpoint, Rendezvous
from . import environment as slurm

_OWN_TOKEN = (
    "before srun, `export LAUNCH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(16))')`"
)


def become_rank(command: Sequence[str], start_timeout: float) -> NoReturn:
    """Replaces this process by `command`, as the rank given by Slurm's variables.

    Exits with 1 if not all ranks arrive within `start_timeout` seconds. Raises ValueError outside
    of a Slurm task, and OSError if the command cannot be started.
    """
    facts, store, environment = join(start_timeout)
    if facts.rank > 0:  # rank 0's store ends with it
        _in_child(lambda: store.request("GET", ALIVE, str(facts.rank), timeout=None))
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:  # it names the last folder of PATH
        raise OSError(error.errno, error.strerror, command[0]) from None


def join(start_timeout: float) -> Tuple[RankFacts, Endpoint, Dict[str, str]]:
    """Joins the other tasks of this step; returns this rank's facts, the store, its environment."""
    env = os.environ
    facts = slurm.facts_from_slurm(env)
    nodes = slurm.expand_nodes(env["SLURM_STEP_NODELIST"])
    deadline = time.monotonic() + start_timeout
    addresses = _store_addresses(nodes, facts, env)
    try:
        token = slurm.step_token(env, user_secret)
    except OSError as error:
        raise ValueError(
            f"the ranks have no secret to know each other by: {error}; {_OWN_TOKEN}"
        ) from None
    ports = slurm.rendezvous_ports(token)
    if facts.rank == 0:
        store = Rendezvous(addresses[0], facts.world_size, token, say, ports, start_timeout)
        _in_child(lambda: _serve(store))
        endpoint = store.endpoint
    else:
        endpoint = _find_store(addresses, ports, token, facts, deadline)
    interface = network.interface_towards(endpoint.address)
    offered = network.addresses_by_interface()[interface][0]
    network.make_own_name_lead_to(offered, interface, len(nodes) > 1)
    _check_in(endpoint, facts, f"{facts.hostname} {interface} {offered}", start_timeout)
    cores, launch_id = cores_of_task(facts.local_size), slurm.step_launch_id(env)
    environment = rank_environment(facts, endpoint.environment(), interface, cores, launch_id)
    if len(os.sched_getaffinity(0)) < count_of(env, "SLURM_CPUS_ON_NODE", 1):
        # Slurm has divided the node's cores: the trainer must not divide this task's once more.
        environment.setdefault("OMP_PROC_BIND", "false")
    return facts, endpoint, environment


def _store_addresses(nodes: List[str], facts: RankFacts, env: Mapping[str, str]) -> List[str]:
    """The IPv4 addresses of task 0's store, which binds the first; the others look at each.

    On its own node it is the local address on the route to another, because the node's own name
    may resolve to 127.0.1.1 there; elsewhere the name may lead to addresses on several networks.
    Of a heterogeneous job the store is on the first part's first node.
    """
    if len(nodes) == 1:
        return [network.LOOPBACK]
    own, given = facts.hostname, env.get("LAUNCH_RENDEZVOUS_HOST")
    first = slurm.expand_nodes(env.get("SLURM_NODELIST_HET_GROUP_0", nodes[0]))[0]
    first = given or (first if first in nodes else nodes[0])
    if own != first and facts.rank == 0 and not given:
        raise ValueError(
            f"rank 0 is on {own}, not on the step's first node, {first}, where the others look for "
            "it (srun --distribution=arbitrary?): set LAUNCH_RENDEZVOUS_HOST="
            f"{own} for all ranks"
        )
    found = _resolve(first) if own != first else []
    if found and not found[0].startswith("127."):
        return found
    other = next(node for node in nodes if node != own)
    return [network.address_towards(_resolve(other)[0])]


def _resolve(node: str) -> List[str]:
    """The addresses of a node, by its name or else by Slurm's NodeAddr; the best routed first."""
    with suppress(socket.gaierror):
        return network.addresses_of(node)
    shown = run(["scontrol", "show", "node", node]).stdout
    with suppress(socket.gaierror):
        if found := re.search(r"NodeAddr=(\S+)", shown):
            return network.addresses_of(found[1])
    raise ValueError(
        f"{socket.gethostname()} cannot find the IPv4 address of {node}: neither name service nor "
        "scontrol knows it; set LAUNCH_RENDEZVOUS_HOST to that of rank 0's node"
    )


def _in_child(action: Callable[[], object]) -> None:
    """Runs `action` in a child process, which dies with this one.

    A thread would not survive the exec.
    """
    rank = os.getpid()
    if os.fork():
        return
    die_with_parent()
    if os.getppid() != rank:  # it has ended already
        os._exit(0)
    # Slurm signals every process of a task; the child must outlive a warning.
    for signum in WARNINGS:
        signal.signal(signum, signal.SIG_IGN)
    try:
        action()
    finally:
        os._exit(0)


def _serve(store: Rendezvous) -> None:
    """Serves as many connections as may be: each rank holds two, and the limit is often 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    store.serve()


def _find_store(
    addresses: List[str], ports: Sequence[int], token: str, facts: RankFacts, deadline: float
) -> Endpoint:
    """The endpoint at which task 0 accepts this step's token."""
    span = f"{min(ports)}-{max(ports)} ({len(ports)} of them)"
    place = f"store of rank 0 at {' or '.join(addresses)}, ports {span}"
    notice, others = time.monotonic() + NOTICE_SECONDS, ""
    while True:
        for port, address in itertools.product(ports, addresses):
            endpoint = Endpoint(address, port, token)
            try:
                if endpoint.knows_token(timeout=2.0):
                    return endpoint
            except (OSError, http.client.HTTPException):
                continue
            others = (
                f"what answers at port {port} has another token: if that is rank 0, the nodes have "
                f"no common home folder: {_OWN_TOKEN}"
            )
        now = time.monotonic()
        if now > deadline:
            _give_up(facts, f"found no {place}; {others or slurm.NOT_BY_SRUN}")
        if now > notice and facts.local_rank == 0:
            who = f"rank {facts.rank} ({facts.hostname})"
            say(f"{who}: waiting for the {place}, for up to {deadline - now:.0f} s more")
            notice = deadline
        time.sleep(0.2)


def _check_in(endpoint: Endpoint, facts: RankFacts, place: str, start_timeout: float) -> None:
    """Checks in at the store; returns when all ranks have."""
    seconds = start_timeout + 5.0  # the store's own clock comes first
    try:
        status, body = endpoint.request(
            "PUT", CHECK_IN, str(facts.rank), place.encode(), timeout=seconds
        )
    except (OSError, http.client.HTTPException) as error:
        _give_up(facts, f"lost rank 0's store at {endpoint.address}:{endpoint.port}: {error}")
    if status != 200:
        _give_up(facts, body.decode())


def _give_up(facts: RankFacts, reason: str) -> NoReturn:
    """Exits with 1; the first rank of each node prints the reason."""
    if facts.local_rank == 0:
        say(f"rank {facts.rank} ({facts.hostname}): {reason}")
    sys.exit(1)
