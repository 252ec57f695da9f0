"""How the tasks of a step find task 0's store, and their errors when they cannot."""

import os
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch.core import network
from launch.core.ranks import facts_on_one_host
from launch.core.rendezvous import Rendezvous
from launch.slurm import rank
from tests.integration.hosts import slurm_variables


@pytest.fixture
def store():
    store = Rendezvous("127.0.0.1", 2, "token", lambda line: None)
    store.serve_in_thread()
    yield store
    store.close()


def test_the_store_may_hold_more_connections_than_a_shell_allows():
    store = Rendezvous("127.0.0.1", 1, "token", lambda line: None)
    store.close()  # `serve` returns at once
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        rank._serve(store)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def soon():
    return time.monotonic() + 10


def test_another_jobs_store_on_the_first_port_is_passed_over(store):
    """Two jobs on one node: the first of our ports belongs to someone else's job."""
    other = Rendezvous("127.0.0.1", 2, "other", lambda line: None)
    other.serve_in_thread()
    ports = [other.endpoint.port, store.endpoint.port]
    found = rank._find_store(["127.0.0.1"], ports, "token", facts_on_one_host(1, 2), soon())
    assert found == store.endpoint
    other.close()


def test_another_service_on_the_first_port_is_passed_over(store):
    with socket.create_server(("127.0.0.1", 0)) as service:

        def talk():
            connection, _ = service.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.close()

        threading.Thread(target=talk, daemon=True).start()
        ports = [service.getsockname()[1], store.endpoint.port]
        found = rank._find_store(["127.0.0.1"], ports, "token", facts_on_one_host(1, 2), soon())
    assert found == store.endpoint


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


@pytest.mark.parametrize("local_rank", [0, 1])
def test_no_store_ends_in_one_line_a_node(capsys, free_port, local_rank):
    with pytest.raises(SystemExit) as exit_:
        rank._find_store(
            ["127.0.0.1"], [free_port], "t", facts_on_one_host(local_rank, 2), time.monotonic()
        )
    assert exit_.value.code == 1
    line = (
        f"launch: rank 0 (localhost): found no store of rank 0 at 127.0.0.1, ports {free_port}-"
        f"{free_port} (1 of them); if srun has not started this process, these are another job's "
        "variables: `unset SLURM_JOB_ID SLURM_STEP_ID SLURM_PROCID`, and put srun before the "
        "command\n"
    )
    assert capsys.readouterr().err == (line if local_rank == 0 else "")


def test_what_a_rank_waits_for_is_said_once(monkeypatch, capsys, free_port):
    monkeypatch.setattr(rank, "NOTICE_SECONDS", 0.0)
    with pytest.raises(SystemExit):
        rank._find_store(
            ["127.0.0.1"], [free_port], "t", facts_on_one_host(0, 2), time.monotonic() + 0.5
        )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    waiting = "launch: rank 0 (localhost): waiting for the store of rank 0 at 127.0.0.1, ports "
    assert said[0].startswith(waiting) and said[0].endswith(", for up to 0 s more")


def on(host, number=1):
    return facts_on_one_host(number, 2)._replace(hostname=host)


def test_addresses(monkeypatch):
    known = {"a": ["127.0.1.1"], "b": ["127.0.0.1"], "c": ["192.0.2.3", "198.51.100.3"]}
    monkeypatch.setattr(network, "addresses_of", known.get)
    monkeypatch.setattr(network, "address_towards", lambda host: f"towards {host}")
    env = {}
    assert rank._store_addresses(["a"], on("a"), env) == ["127.0.0.1"]
    # On the first node its own name may mean 127.0.1.1: the route to the second one counts.
    assert rank._store_addresses(["a", "b"], on("a"), env) == ["towards 127.0.0.1"]
    assert rank._store_addresses(["c", "b"], on("b"), env) == ["192.0.2.3", "198.51.100.3"]
    # The parts of a heterogeneous job, whose list of all nodes is sorted by name.
    env = {"SLURM_NODELIST_HET_GROUP_0": "c"}
    assert rank._store_addresses(["b", "c"], on("c", 0), env) == ["towards 127.0.0.1"]
    assert rank._store_addresses(["b", "c"], on("b"), env) == known["c"]
    assert rank._store_addresses(["a", "b"], on("a", 0), env) == ["towards 127.0.0.1"]


@pytest.mark.parametrize("given", ["a", "a.example.org"])
def test_the_host_that_is_given_may_have_a_name_that_leads_to_itself(monkeypatch, given):
    """On Debian /etc/hosts has `127.0.1.1 a.example.org a`, where nobody else finds the store."""
    known = {"a": ["127.0.1.1"], "a.example.org": ["127.0.1.1"], "c": ["192.0.2.3"]}
    monkeypatch.setattr(network, "addresses_of", known.get)
    monkeypatch.setattr(network, "address_towards", {"192.0.2.3": "192.0.2.9"}.get)
    env = {"LAUNCH_RENDEZVOUS_HOST": given}
    assert rank._store_addresses(["a", "c"], on("a", 0), env) == ["192.0.2.9"]
    known[given] = ["192.0.2.9"]
    assert rank._store_addresses(["a", "c"], on("c"), env) == ["192.0.2.9"]


def test_rank_0_on_another_node_than_the_first_says_what_to_set():
    """As with `srun --distribution=arbitrary`; other nodes cannot tell where it is."""
    with pytest.raises(ValueError, match="rank 0 is on b, .*set LAUNCH_RENDEZVOUS_HOST=b for"):
        rank._store_addresses(["a", "b"], on("b", 0), {})


def test_unknown_node_names_the_way_out(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        ValueError, match=r"cannot find the IPv4 address of nonesuch\.invalid: .*set LAUNCH_"
    ):
        rank._resolve("nonesuch.invalid")


def alone(*command, **variables):
    """The only rank of a step."""
    env = {**os.environ, **slurm_variables(0, 1), "LAUNCH_TOKEN": "s", **variables}
    env.pop("OMP_PROC_BIND", None)
    rank = [sys.executable, "-m", "launch", "slurm-rank", "--", *command]
    return subprocess.run(rank, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("on_node", "kept"), [(4096, "false"), (1, "")])
def test_cores_that_slurm_has_bound_are_not_divided_once_more(on_node, kept):
    """The trainer divides them by the node's ranks unless OMP_PROC_BIND is set."""
    done = alone("sh", "-c", "echo $OMP_PROC_BIND", SLURM_CPUS_ON_NODE=str(on_node))
    assert (done.stdout, done.stderr) == (f"{kept}\n", "")


def test_a_command_that_is_not_there_is_named_as_it_was_given():
    done = alone("nonesuch")
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 2] No such file or directory: 'nonesuch'\n"
