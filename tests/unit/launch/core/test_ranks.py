"""Rank facts, threads, interfaces, exit codes and which rank is blamed."""

import os
import queue
import re
import signal
import socket
import sys

import pytest

from launch.__main__ import main
from launch.core import network, ranks
from launch.core.process import MAX_LINE, describe_exit, first_cause, lacks_cause, shell_exit_code
from launch.core.rank_process import RankProcess
from launch.core.ranks import (
    cores_of_task,
    cores_per_rank,
    facts_on_one_host,
    rank_environment,
    tasks_of_srun,
)
from trainer.dist import environment


def test_environment_of_a_rank(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    env = rank_environment(
        facts_on_one_host(1, 4), {"HOROVOD_GLOO_RENDEZVOUS_PORT": "9"}, "lo", 3, "id"
    )
    assert env["HOROVOD_RANK"] == env["HOROVOD_LOCAL_RANK"] == "1"
    assert env["HOROVOD_SIZE"] == env["HOROVOD_LOCAL_SIZE"] == "4"
    assert (env["HOROVOD_CROSS_RANK"], env["HOROVOD_CROSS_SIZE"]) == ("0", "1")
    assert env["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "9"
    assert env["HOROVOD_GLOO_IFACE"] == env["NCCL_SOCKET_IFNAME"] == "lo"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert env["HOROVOD_CONTROLLER"] == env["HOROVOD_CPU_OPERATIONS"] == "gloo"
    assert (env["HOROVOD_HOSTNAME"], env["LAUNCH_ID"]) == ("localhost", "id")
    assert env["PYTHONUNBUFFERED"] == "1"


def test_user_settings_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    env = rank_environment(facts_on_one_host(0, 1), {}, "lo", 3, "id")
    assert (env["OMP_NUM_THREADS"], env["NCCL_SOCKET_IFNAME"]) == ("7", "ib0")


@pytest.mark.parametrize("activated", [False, True])
def test_python_means_the_launchers(monkeypatch, tmp_path, activated):
    """That of an environment, be it of venv or conda; whose sys.prefix is its sys.base_prefix."""
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.delenv("LAUNCH_PATH", raising=False)
    path = f"{tmp_path}:/users:/bin" if activated else "/users:/bin"
    monkeypatch.setenv("PATH", path)
    env = rank_environment(facts_on_one_host(0, 1), {}, "lo", 1, "id")
    assert env["PATH"] == f"{tmp_path}:/users:/bin"
    assert env.get("LAUNCH_PATH", path) == path


def test_a_python_of_another_name_leaves_the_path_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    monkeypatch.setenv("PATH", "/users:/bin")
    env = rank_environment(facts_on_one_host(0, 1), {}, "lo", 1, "id")
    assert env["PATH"] == "/users:/bin"


def test_what_an_elastic_horovodrun_left_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    assert "HOROVOD_ELASTIC" not in rank_environment(facts_on_one_host(0, 1), {}, "lo", 1, "id")


@pytest.fixture
def bound_to(monkeypatch):
    """Binds this process to so many cores, in a container with such a CPU quota."""

    def bind(cores, quota):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0: set(range(cores))}[pid])
        monkeypatch.setattr(ranks, "quota_cores", lambda: quota)

    return bind


@pytest.mark.parametrize(
    ("bound", "quota", "env", "number", "cores"),
    [
        (9, None, {}, 2, 4),
        (2, None, {}, 4, 1),
        (64, 4, {}, 2, 2),
        (4, 64, {}, 2, 2),
        (64, None, {"SLURM_CPUS_ON_NODE": "16"}, 4, 4),  # all of the node is visible, a part ours
        (8, None, {"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "8"}, 4, 2),  # `srun -n1 -c8`
        (2, None, {"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "64"}, 2, 1),  # another job's
    ],
)
def test_cores_are_divided_among_the_ranks_of_one_process(
    bound_to, bound, quota, env, number, cores
):
    bound_to(bound, quota)
    assert cores_per_rank(number, env) == cores


@pytest.mark.parametrize(
    ("bound", "quota", "env", "local_size", "cores"),
    [
        (64, None, {"SLURM_CPUS_ON_NODE": "19"}, 4, 4),
        (64, 8, {"SLURM_CPUS_ON_NODE": "16"}, 4, 2),  # slurmd in a container of 8 CPUs
        (1, None, {"SLURM_CPUS_ON_NODE": "8"}, 4, 1),  # bound to a core each: not divided again
        (64, None, {"SLURM_CPUS_PER_TASK": "5", "SLURM_CPUS_ON_NODE": "48"}, 8, 5),
        (1, None, {"SLURM_CPUS_PER_TASK": "5", "SLURM_CPUS_ON_NODE": "48"}, 8, 1),  # the job's
    ],
)
def test_cores_of_a_slurm_task(bound_to, bound, quota, env, local_size, cores):
    bound_to(bound, quota)
    assert cores_of_task(local_size, env) == cores


def test_a_count_that_is_none_is_refused_with_what_it_may_be():
    said = (
        "SLURM_CPUS_PER_TASK is '0'; it must be a whole number from 1 to 999999, such as 1: "
        "correct it, or `unset SLURM_CPUS_PER_TASK`"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        cores_of_task(1, {"SLURM_CPUS_PER_TASK": "0"})
    with pytest.raises(ValueError, match=r"SLURM_STEP_NUM_TASKS is '1\.5'; .*, such as 1: "):
        tasks_of_srun({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1.5"})


def test_tasks_are_those_that_srun_started():
    assert tasks_of_srun({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}) == 4
    assert tasks_of_srun({"SLURM_STEP_NUM_TASKS": "4"}) == 1
    assert tasks_of_srun({"SLURM_PROCID": "0"}) == 1


def test_a_shell_on_a_terminal_of_srun_is_one_process(monkeypatch):
    """`srun -n4 --pty bash`: the variables are those of four tasks."""
    task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "39001"}
    for terminal, count in ((True, 1), (False, 4)):  # the latter in an srun within that shell
        monkeypatch.setattr(os, "isatty", {0: terminal, 1: False, 2: False}.__getitem__)
        assert tasks_of_srun(task) == count
        with monkeypatch.context() as context:
            for name, value in task.items():
                context.setenv(name, value)
            assert environment.size() == count


def test_route_to_this_machine(monkeypatch):
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    name = network.interface_of("127.0.0.1")
    assert name in network.addresses_by_interface()
    assert network.interface_of("127.0.1.1") == name
    for given in ("", name):
        monkeypatch.setenv("HOROVOD_GLOO_IFACE", given)
        assert network.interface_towards("127.0.0.1") == name


def test_wrong_interface_lists_the_right_ones(monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth99")
    with pytest.raises(ValueError) as error:
        network.interface_towards("127.0.0.1")
    text = str(error.value)
    assert text.startswith(
        f"HOROVOD_GLOO_IFACE=eth99: {socket.gethostname()} has no such interface"
    )
    assert f"{network.interface_of('127.0.0.1')} (127.0.0.1" in text
    with pytest.raises(
        ValueError, match=r"no interface of this machine has the address 192\.0\.2\.1"
    ):
        network.interface_of("192.0.2.1")


def test_exit_codes_in_words():
    assert shell_exit_code(3) == 3
    assert shell_exit_code(-9) == 137
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-15) == "was killed by SIGTERM"
    assert describe_exit(-40) == "was killed by signal 40"
    assert "memory ran out" in describe_exit(-9)
    assert "run again" in describe_exit(85)


LOST = "MXNetError: Horovod has been shut down. This was caused by an exception on one of the ranks"


@pytest.mark.parametrize(
    ("failed", "without_cause", "unresponsive", "named"),
    [
        ([2, 0, 1], [], [], 2),
        ([2, 0, 1], [2, 0], [], 1),  # 2 and 0 ended first, but only because they lost 1
        ([2, 0], [2, 0], [1], 1),  # 1 stood still
        ([2, 0], [2, 0], [], 2),
        ([], [], [], None),
    ],
)
def test_the_cause_is_named_not_the_first_to_end(failed, without_cause, unresponsive, named):
    assert first_cause(failed, without_cause.__contains__, unresponsive) == named


def test_a_limit_of_threads_is_one_line_and_leaves_no_rank(monkeypatch, capsys):
    """As where `ulimit -u` lets the ranks start, but not the threads that read what they say."""
    started = []

    def refuse(rank, events, patience):
        started.append(rank.process)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(RankProcess, "watch", refuse)
    assert main(["local", "-n", "1", "--", "sleep", "600"]) == 2
    said = "error: can't start new thread: raise the limit of processes (`ulimit -u`)"
    assert capsys.readouterr().err.startswith(said)
    assert started[0].wait(timeout=60) == -signal.SIGKILL


def test_a_line_without_end_is_broken(capfdbinary):
    rank = RankProcess(0, ["printf", f"%0{MAX_LINE + 9}d"], dict(os.environ), lambda: None, "[0] ")
    events = queue.SimpleQueue()
    rank.watch(events, patience=0)
    assert events.get(timeout=60) is rank
    assert capfdbinary.readouterr().out == b"[0] %b\n[0] %b\n" % (b"0" * MAX_LINE, b"0" * 9)


def test_last_lines_that_lack_the_cause():
    assert lacks_cause(True, ["Traceback", LOST])
    assert lacks_cause(
        False, ["... tcp/pair.cc:589] Read error [10.0.0.1]:9: Connection reset by peer"]
    )
    assert lacks_cause(True, [])  # rank 0 speaks for all
    assert not lacks_cause(False, [])  # a signal is a cause
    assert not lacks_cause(True, ["RuntimeError: boom"])
