"""Allreduce through memory shared by processes of one machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List

import numpy as np
import psutil
import pytest

from tests.waiting import wait_until
from trainer.dist import environment, shared_memory
from trainer.dist.shared_memory import SharedMemorySum


def opened(path: str) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR)


def opened_by_all(path: str, capacity: int, index: int, size: int) -> SharedMemorySum:
    """As ``connect`` leaves it: a process that has not opened the file counts as dead."""
    shared = SharedMemorySum(opened(path), capacity, index, size)
    wait_until(
        lambda: shared._entered(slice(None)), lambda: "not all processes have opened the file"
    )
    return shared


def results_of(target: Callable[..., None], path: str, size: int, calls: int) -> List[Any]:
    """What each of ``size`` processes puts into its queue, in the order in which they end."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(path, index, size, calls, results) for index in range(size)]
    processes = [context.Process(target=target, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return found


def add_up(path: str, index: int, size: int, calls: int, results: Any) -> None:
    shared = opened_by_all(path, 5, index, size)
    sums = [shared(np.arange(1 + k % 5) * (index + 1.0) + k) for k in range(calls)]
    results.put([float(s.sum()) for s in sums])


@pytest.mark.parametrize("size", [2, 4])
def test_every_process_gets_every_sum(tmp_path: Path, size: int) -> None:
    calls = 300
    got = results_of(add_up, str(tmp_path / "sum"), size, calls)
    weights = size * (size + 1) / 2
    expected = [sum(i * weights + k * size for i in range(1 + k % 5)) for k in range(calls)]
    assert got == [expected] * size


def broadcast(path: str, index: int, size: int, calls: int, results: Any) -> None:
    shared = opened_by_all(path, 2, index, size)
    received = []
    for call in range(calls):
        values = np.full(call % 50, 100 * index + call, np.uint8)  # of up to four slots
        shared.broadcast(values)
        received.append(values.tobytes())
        received.append(shared(np.ones(2)).tobytes())
    results.put(received)


def test_every_process_gets_what_process_0_broadcasts(tmp_path: Path) -> None:
    size, calls = 3, 100
    got = results_of(broadcast, str(tmp_path / "sum"), size, calls)
    sums = np.full(2, float(size)).tobytes()
    expected = [value for k in range(calls) for value in (bytes([k]) * (k % 50), sums)]
    assert got == [expected] * size


def wait_for_ever(path: str, entered: Any) -> None:
    _held = SharedMemorySum(opened(path), 1, 1, 2)  # whose file, closed, would hold no lock
    entered.set()
    signal.pause()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Any]:
    """Process 1 of 2, which has opened ``sum`` in ``tmp_path``; it never calls."""
    context = multiprocessing.get_context("spawn")
    entered = context.Event()
    arguments = str(tmp_path / "sum"), entered
    process = context.Process(target=wait_for_ever, args=arguments, daemon=True)
    process.start()
    assert entered.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_dead_peer_is_noticed(peer: Any, tmp_path: Path) -> None:
    shared = SharedMemorySum(opened(str(tmp_path / "sum")), 1, 0, 2)
    os.kill(peer.pid, signal.SIGKILL)  # and nobody waits for it: a zombie still has its pid
    with pytest.raises(RuntimeError, match="process 1 of 2 on this node ended"):
        shared(np.ones(1))


def lose_a_peer(path: str, index: int, size: int, calls: int, results: Any) -> None:
    shared = opened_by_all(path, 1, index, size)
    if index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        shared(np.ones(1))
    except shared_memory.LostPeerError as error:
        results.put(str(error))
    signal.pause()  # alive, whoever else waits


def test_a_dead_peer_is_noticed_by_all_although_none_of_them_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    places = [(str(tmp_path / "sum"), index, 3, 1, results) for index in range(3)]
    processes = [context.Process(target=lose_a_peer, args=a, daemon=True) for a in places]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=60) for _ in range(2)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert found == ["process 0 of 3 on this node ended before its turn"] * 2


def test_a_stopped_peer_is_given_as_long_as_horovod_gives_it(
    peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "patience", lambda: 0.5)
    shared = SharedMemorySum(opened(str(tmp_path / "sum")), 1, 0, 2)
    shared._enter()
    shared.check_peers()  # it lives
    os.kill(peer.pid, signal.SIGSTOP)
    status = psutil.Process(peer.pid).status
    wait_until(lambda: status() == psutil.STATUS_STOPPED, status)
    shared.check_peers()
    shared.check_peers()
    with pytest.raises(RuntimeError, match="process 1 of 2 on this node has been stopped for 1 s"):
        shared.check_peers()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), psutil.NoSuchProcess(1)])
def test_a_state_that_cannot_be_read_is_not_that_of_a_stopped_peer(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(process: psutil.Process) -> str:
        raise error

    monkeypatch.setattr(psutil.Process, "status", status)
    assert not shared_memory._is_stopped(os.getpid())


# Exclusively, without waiting.
TAKE_LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), 6, 1)"


def test_process_0_which_made_the_file_holds_its_lock() -> None:
    """Or its peers take it for dead, each time that it is late."""
    shared = shared_memory.connect(1, 0, 1, lambda values: values)
    path = f"/proc/{os.getpid()}/fd/{shared.fileno()}"
    locked = subprocess.run([sys.executable, "-c", TAKE_LOCK, path], stderr=subprocess.PIPE)
    assert b"BlockingIOError" in locked.stderr


def test_where_files_in_memory_are_forbidden_processes_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(name)

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert shared_memory.connect(1, 0, 1, lambda values: values) is None
    assert shared_memory.open_shared(64, 0, 1, lambda values: values) is None


def descriptors_of_memory() -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(os.readlink(link).startswith("/memfd:ranks_") for link in links if link.is_symlink())


@pytest.mark.parametrize("what", ["sum", "memory"])
def test_processes_that_do_not_see_each_other_agree_to_do_without(what: str) -> None:
    """Two 'processes' (threads) that meet in other sums; one may have another network."""
    barrier, sums = threading.Barrier(2), {}

    def meet(index: int, apart: bool, results: List[Any]) -> None:
        def sum_over_ranks(values: np.ndarray) -> np.ndarray:
            sums[index] = values
            barrier.wait(10)
            total = sums[0] + sums[1]
            barrier.wait(10)
            return total // 2 if apart and total[0] > 2 else total  # not the socket's name

        if what == "sum":
            results.append(shared_memory.connect(3, index, 2, sum_over_ranks))
        else:
            results.append(shared_memory.open_shared(64, index, 2, sum_over_ranks))

    gc.collect()
    kept = descriptors_of_memory()
    for apart in (True, False):
        results: List[Any] = []
        arguments = [(0, False, results), (1, apart, results)]
        threads = [threading.Thread(target=meet, args=a) for a in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [shared is None for shared in results] == [apart] * 2
    if what == "memory":
        results[0][60:64] = b"seen"
        assert results[1][:] == bytes(60) + b"seen"
    del results, arguments, threads
    gc.collect()
    assert descriptors_of_memory() == kept


def test_another_users_process_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user of this machine may knock: /proc/net/unix shows the names of sockets."""
    monkeypatch.setattr(os, "geteuid", lambda: 4711)  # so that this process is another user's
    numbers = []
    with socket.socket(socket.AF_UNIX) as stranger:

        def sum_over_ranks(values: np.ndarray) -> np.ndarray:
            numbers.append(int(values[0]))
            if len(numbers) == 1:
                stranger.connect(b"\0ranks_%x" % numbers[0])
            return values

        assert shared_memory.open_shared(64, 0, 1, sum_over_ranks) is not None
        assert stranger.recvmsg(1, socket.CMSG_SPACE(4))[:2] == (b"", [])


def test_nor_is_its_file_taken_for_process_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(f"\0ranks_{os.getpid():x}")
        stranger.listen()
        stranger.setblocking(False)
        assert shared_memory.connect(1, 1, 2, lambda values: values + os.getpid()) is None
        peer, _ = stranger.accept()
        with peer:
            assert peer.recv(1) == b""


IN_NAMESPACES = """
import ctypes, os, socket
import numpy as np
from launch.core.network import take_hostname
from trainer.dist import shared_memory
if os.getuid() == 0:
    os.setgid(1000)
    os.setuid(1000)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: its files in /proc are its own again
ends = socket.socketpair()
index = 0 if os.fork() else 1
take_hostname(f"192.0.2.{index}")
def sum_over_ranks(values):
    ends[index].sendall(values.tobytes())
    return values + np.frombuffer(ends[index].recv(values.nbytes, socket.MSG_WAITALL))
shared = shared_memory.connect(3, index, 2, sum_over_ranks)
os.write(1, b"sum %d\\n" % (0 if shared is None else shared(np.ones(1))[0]))
if index == 0:
    os.wait()
"""


def test_ranks_with_host_names_of_their_own_share_memory() -> None:
    """Each makes a user namespace for it, as an ordinary user must; /proc/PID/fd is then closed."""
    command = [sys.executable, "-c", IN_NAMESPACES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "no namespace for a host name of its own" in done.stderr:
        pytest.skip("this system allows ordinary users no namespaces")
    assert done.stdout == "sum 2\nsum 2\n", done.stderr
