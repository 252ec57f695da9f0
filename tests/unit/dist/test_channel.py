"""Sums over nodes through TCP connections: here each node's leader is a thread of one process."""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, List

import numpy as np
import pytest

from tests.waiting import wait_until
from trainer.dist import channel, environment
from trainer.dist.channel import TOKEN_BYTES, Channel, Listener, partners

HERE = "127.0.0.1"
SUMMED, LOST, MISMATCH = 0, 1, 2


def at_once(functions: List[Callable[[], Any]]) -> List[Any]:
    """The results of functions that wait for each other."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures: List[Future[Any]] = [pool.submit(function) for function in functions]
        return [future.result(60) for future in futures]


def connected(nodes: int, host: str = HERE) -> List[Channel]:
    listeners = [Listener(host) for _ in range(nodes)]
    return meet(listeners, secrets.token_bytes(TOKEN_BYTES))


def meet(listeners: List[Listener], token: bytes) -> List[Channel]:
    addresses = [listener.address for listener in listeners]

    def one(node: int) -> Channel:
        return listeners[node].meet(node, addresses, token)

    return at_once([lambda node=node: one(node) for node in range(len(listeners))])


def add_up(channels: List[Channel], values: List[np.ndarray], stream: int = 0) -> List[int]:
    return at_once([lambda c=c, v=v: c.sum(stream, 1, v) for c, v in zip(channels, values)])


@pytest.mark.parametrize("nodes", range(1, 18))
def test_partners_are_mutual_and_few(nodes: int) -> None:
    pairs = {(node, peer) for node in range(nodes) for peer in partners(node, nodes)}
    assert pairs == {(b, a) for a, b in pairs} and all(a != b for a, b in pairs)
    assert all(len(partners(node, nodes)) <= nodes.bit_length() for node in range(nodes))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_all_nodes_get_the_same_bits_in_every_run(nodes: int, dtype: type) -> None:
    random, results = np.random.RandomState(0), []
    given = [(random.normal(size=129) * 10.0**node * 1e6).astype(dtype) for node in range(nodes)]
    for _ in range(2):
        values = [own.copy() for own in given]
        assert add_up(connected(nodes), values) == [SUMMED] * nodes
        results += [own.tobytes() for own in values]
    assert len(set(results)) == 1
    np.testing.assert_allclose(values[0], np.sum(given, axis=0), rtol=1e-12)


def test_many_calls_of_streams_that_each_node_takes_in_another_order() -> None:
    """A thread a stream, as in MXNet's engine; the sizes change from call to call."""
    nodes, streams, calls = 3, 8, 60
    channels = connected(nodes)

    def work(node: int, stream: int) -> None:
        for call in range(calls):
            values = np.full(1 + (7 * call) % 50, float(node + 10 * stream + 1000 * call))
            assert channels[node].sum(stream, call, values) == SUMMED
            assert (values == 3 + 30 * stream + 3000 * call).all()

    places = itertools.product(range(nodes), range(streams))
    at_once([lambda place=place: work(*place) for place in places])


def test_messages_larger_than_any_buffer_pass_both_ways_at_once() -> None:
    values = [np.full(4_000_000, node + 1.0) for node in range(2)]
    assert add_up(connected(2), values) == [SUMMED] * 2
    assert all((own == 3).all() for own in values)


def test_ipv6() -> None:
    values = [np.ones(3) for _ in range(2)]
    try:
        channels = connected(2, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert add_up(channels, values) == [SUMMED] * 2 and (values[0] == 2).all()


@pytest.mark.parametrize("different", ["length", "dtype", "call"])
def test_calls_that_do_not_belong_together_end_on_all_nodes(different: str) -> None:
    """Whichever node differs; and other streams go on."""
    for nodes, odd in itertools.product((2, 3, 5), (0, 1)):
        channels = connected(nodes)

        def one(node: int, odd: int = odd, channels: List[Channel] = channels) -> int:
            values, call = np.ones(3), 1
            if node == odd:
                call += different == "call"
                values = np.ones(4) if different == "length" else values
                values = values.astype(np.int64) if different == "dtype" else values
            return channels[node].sum(0, call, values)

        assert at_once([lambda n=n: one(n) for n in range(nodes)]) == [MISMATCH] * nodes
        assert add_up(channels, [np.ones(2) for _ in range(nodes)], stream=1) == [SUMMED] * nodes


def test_one_node_without_its_partner_gives_up_and_so_do_all() -> None:
    """Node 2 waits for node 0, which waits for node 1; node 1 closes its connections."""
    channels = connected(3)
    outcomes: Dict[int, int] = {}

    def wait(node: int) -> None:
        outcomes[node] = channels[node].sum(0, 1, np.ones(3))

    threads = [threading.Thread(target=wait, args=(node,)) for node in (0, 2)]
    for thread in threads:
        thread.start()
    channels[1].abandon()
    for thread in threads:
        thread.join(60)
    assert outcomes == {0: LOST, 2: LOST}
    assert "lost node 1 of 3" in channels[0].lost() and "lost node 0 of 3" in channels[2].lost()
    assert channels[1].sum(0, 1, np.ones(3)) == LOST


def test_a_partner_that_stands_still_is_lost_after_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its connection is open, and the kernel acknowledges what it is sent."""
    monkeypatch.setattr(environment, "patience", lambda: 0.5)
    ours, theirs = socket.socketpair()
    still = Channel(0, 2, {1: ours})
    assert still.sum(0, 1, np.ones(3)) == LOST
    assert "lost node 1 of 2: it ended or was silent for 0.5 s" in still.lost()
    theirs.close()


def test_partners_that_have_nothing_to_say_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "patience", lambda: 0.5)
    first, second = connected(2)
    sums: List[int] = []
    waiting = threading.Thread(target=lambda: sums.append(first.sum(0, 1, np.ones(3))))
    waiting.start()
    waiting.join(2)  # four times as long as one may be silent
    assert waiting.is_alive()
    assert second.sum(0, 1, np.ones(3)) == SUMMED
    waiting.join(60)
    assert sums == [SUMMED]


TOKEN = bytes(range(TOKEN_BYTES))
STRANGERS = {
    "silent": b"",
    "half a token": TOKEN[:9],
    "another token": bytes(TOKEN_BYTES // 2) + b"\0\0\0\1",
    "a node that nobody waits for": TOKEN[: TOKEN_BYTES // 2] + b"\0\0\0\7",
    "itself": TOKEN[: TOKEN_BYTES // 2] + b"\0\0\0\0",
    "garbage": b"GET / HTTP/1.1\r\n" * 1000,
}


@pytest.mark.parametrize("says", STRANGERS)
def test_a_stranger_is_dropped_and_holds_up_nobody(
    says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes first; the time-out, which a silent one would cost, is longer than the test."""
    monkeypatch.setattr(channel, "_SECONDS_TO_SPEAK", 600)
    listeners = [Listener(HERE) for _ in range(2)]
    stranger = socket.create_connection(listeners[0].address)
    stranger.sendall(STRANGERS[says])
    channels = meet(listeners, TOKEN)
    assert closed(stranger), "without an answer"
    assert add_up(channels, [np.ones(1), np.ones(1)]) == [SUMMED] * 2
    with pytest.raises(ConnectionRefusedError):  # nobody can come later
        socket.create_connection(listeners[0].address)


def closed(connection: socket.socket) -> bool:
    connection.settimeout(60)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_more_silent_connections_than_are_kept_hold_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "_SECONDS_TO_SPEAK", 600)
    monkeypatch.setattr(channel, "_MOST_SILENT", 20)
    listeners = [Listener(HERE) for _ in range(2)]
    silent, stop = [], threading.Event()

    def connect() -> None:
        while not stop.is_set() and len(silent) < 300:
            try:
                silent.append(socket.create_connection(listeners[0].address, 1))
            except OSError:  # the backlog is full, or the listener closed
                continue

    crowd = threading.Thread(target=connect)
    crowd.start()
    wait_until(lambda: len(silent) >= 10, lambda: len(silent))
    try:
        channels = meet(listeners, TOKEN)
    finally:
        stop.set()
        crowd.join()
    assert add_up(channels, [np.ones(1), np.ones(1)]) == [SUMMED] * 2
    assert all(map(closed, silent))


def test_silent_connections_are_closed_while_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "_SECONDS_TO_SPEAK", 0.2)
    listeners = [Listener(HERE) for _ in range(2)]
    stranger = socket.create_connection(listeners[0].address)
    addresses = [listener.address for listener in listeners]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(listeners[0].meet, 0, addresses, TOKEN)
        assert closed(stranger) and not first.done()
        second = listeners[1].meet(1, addresses, TOKEN)
        assert add_up([first.result(60), second], [np.ones(1), np.ones(1)]) == [SUMMED] * 2


@pytest.mark.parametrize(
    ("node", "why"), [(0, "another node did not connect"), (1, "no connection to 127.0.0.1:")]
)
def test_who_meets_nobody_says_so(node: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_SECONDS_TO_CONNECT", 0.3)
    listeners = [Listener(HERE) for _ in range(2)]
    addresses = [listener.address for listener in listeners]
    listeners[1 - node].close()
    with pytest.raises(OSError, match=why):
        listeners[node].meet(node, addresses, TOKEN)


def test_who_does_not_know_the_answer_is_no_leader() -> None:
    """A service that has taken the port of one that is gone."""
    service = socket.create_server((HERE, 0))
    listener = Listener(HERE)
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(listener.meet, 1, [service.getsockname(), listener.address], TOKEN)
        other, _ = service.accept()
        other.sendall(bytes(TOKEN_BYTES))
        with pytest.raises(OSError, match="did not accept the connection"):
            meeting.result(60)
    service.close()


def test_the_address_is_that_of_gloos_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    assert channel.own_address() == HERE
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth99")
    with pytest.raises(OSError, match="HOROVOD_GLOO_IFACE=eth99 has no address"):
        channel.own_address()
    monkeypatch.delenv("HOROVOD_GLOO_IFACE")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    assert channel.own_address() == HERE
