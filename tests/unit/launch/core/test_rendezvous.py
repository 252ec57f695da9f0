"""The rendezvous store: its token, waiting for late ranks, strangers, shutdown."""

import contextlib
import http.client
import http.server
import re
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from launch.core import arrivals, rendezvous
from launch.core.arrivals import CHECK_IN, Arrivals, ranks_text
from launch.core.rendezvous import ALIVE, Endpoint, Rendezvous
from tests.waiting import wait_until


class Store(Rendezvous):
    """A served store on the loopback address, with what it has said."""

    def __init__(self, world_size=2, **options):
        self.said = []
        super().__init__("127.0.0.1", world_size, "token", self.said.append, **options)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def put(self, scope, key, value=b"a lo 127.0.0.1"):
        return self.endpoint.request("PUT", scope, key, value)

    def get(self, scope, key):
        return self.endpoint.request("GET", scope, key)


@pytest.fixture
def store():
    store = Store()
    yield store
    store.close()
    store.thread.join()


def in_background(function, *arguments):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function(*arguments)), daemon=True)
    thread.start()
    return thread, answers


def test_stores_and_returns(store):
    assert store.get("global", "0") == (404, b"")
    assert store.put("global", "0", b"address") == (200, b"")
    assert store.get("global", "0") == (200, b"address")


def test_gloo_gets_address_port_and_token(store):
    """Horovod builds http://ADDR:PORT/scope/key of these two."""
    told = store.endpoint.environment()
    url = "http://{HOROVOD_GLOO_RENDEZVOUS_ADDR}:{HOROVOD_GLOO_RENDEZVOUS_PORT}".format(**told)
    port = store.endpoint.port
    assert url == f"http://127.0.0.1:{port}{store.endpoint.path_prefix}"


def test_only_the_jobs_token_opens_it(store):
    stranger = Endpoint("127.0.0.1", store.endpoint.port, "guess")
    for method in ("GET", "PUT", "DELETE"):
        status, _ = stranger.request(method, "global", "0", b"poison")
        assert status == 403
    assert store.get("global", "0") == (404, b"")
    assert store.said == [
        "127.0.0.1 spoke to the rendezvous port without this job's token; ignored"
    ]


@pytest.mark.parametrize("noise", [b"", b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"A" * 70000 + b"\n"])
def test_other_protocols_do_no_harm(store, noise, capfd):
    with socket.create_connection(("127.0.0.1", store.endpoint.port)) as stranger:
        stranger.sendall(noise)
    assert store.put("global", "0", b"x") == (200, b"")
    assert capfd.readouterr().err == ""


def test_a_silent_stranger_keeps_nobody_waiting(store):
    with socket.create_connection(("127.0.0.1", store.endpoint.port)):
        assert store.get("global", "0") == (404, b"")


def watching(store):
    return store.endpoint.request("GET", ALIVE, "1", timeout=None)


def closed(connection, seconds=10):
    """Whether the other end closes the connection in time."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except OSError:
        return False


def test_of_many_silent_strangers_the_first_are_turned_out(store, monkeypatch):
    monkeypatch.setattr(rendezvous, "MOST_SILENT", 4)
    place = (store.endpoint.address, store.endpoint.port)
    with contextlib.ExitStack() as stack:
        watch, _ = in_background(watching, store)  # has shown the token, so it stays
        silent = [stack.enter_context(socket.create_connection(place)) for _ in range(12)]
        assert all(closed(stranger) for stranger in silent[:8])
        assert not closed(silent[-1], 0.1)
        assert store.put("global", "0", b"x") == (200, b"")
        assert watch.is_alive()


def test_a_stranger_who_never_ends_a_request_is_turned_out(store, monkeypatch):
    monkeypatch.setattr(rendezvous, "SECONDS_TO_SPEAK", 0.5)
    with socket.create_connection((store.endpoint.address, store.endpoint.port)) as stranger:

        def speak():
            with contextlib.suppress(OSError):
                while True:
                    stranger.sendall(b"G")
                    time.sleep(0.05)

        threading.Thread(target=speak, daemon=True).start()
        assert closed(stranger)


def test_a_rank_is_watched_for_longer_than_a_request_may_take(store, monkeypatch):
    monkeypatch.setattr(rendezvous._Handler, "timeout", 0.2)
    watch, answers = in_background(watching, store)
    watch.join(1)
    assert watch.is_alive() and not answers


class Relay(http.server.BaseHTTPRequestHandler):
    """A store of somebody who knows no token, and passes all that is asked on to the real one."""

    def do_GET(self):
        self.server.heard.append(self.path)
        status, body = self.server.real(self.path)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_store_that_does_not_know_the_token_never_hears_it(store):
    def real(path):
        connection = http.client.HTTPConnection("127.0.0.1", store.endpoint.port)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Relay) as server:
        server.heard, server.real = [], real
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = Endpoint("127.0.0.1", server.server_address[1], "token")
        assert not asked.knows_token(timeout=5)
        server.shutdown()
    assert server.heard and not any("token" in path for path in server.heard)
    assert store.endpoint.knows_token(timeout=5)
    assert not Endpoint("127.0.0.1", store.endpoint.port, "other").knows_token(timeout=5)
    assert store.said == []


@pytest.mark.parametrize(("scope", "key"), [(CHECK_IN, "{}"), ("global", "rank_{}")])
def test_the_first_rank_waits_for_the_last(store, scope, key):
    thread, answers = in_background(store.put, scope, key.format(0))
    assert store.get(scope, key.format(1)) == (404, b"")
    assert not answers
    assert store.put(scope, key.format(1)) == (200, b"")
    thread.join()
    assert answers == [(200, b"")]


def test_rank_0_is_answered_last_as_the_store_may_end_with_it(store, monkeypatch):
    order, answered = [], Arrivals.answered

    def late(arrivals, path):
        time.sleep(0.3 * path.endswith("1"))
        order.append(path)
        answered(arrivals, path)

    monkeypatch.setattr(Arrivals, "answered", late)
    thread, answers = in_background(store.put, CHECK_IN, "0")
    assert store.put(CHECK_IN, "1") == (200, b"")
    thread.join()
    assert answers == [(200, b"")]
    wait_until(lambda: order == [f"/{CHECK_IN}/1", f"/{CHECK_IN}/0"], lambda: order)


def test_hosts_that_offer_one_address_are_told_before_gloo_looks_for_them(store):
    """As by HOROVOD_GLOO_IFACE=docker0; each rank would find itself there."""
    thread, answers = in_background(store.put, CHECK_IN, "0", b"a docker0 172.17.0.1")
    status, said = store.put(CHECK_IN, "1", b"b docker0 172.17.0.1")
    thread.join()
    assert answers == [(status, said)] and status == 408
    words = rb"(a and b|b and a) both have the address 172\.17\.0\.1 on docker0, so .*"
    assert re.fullmatch(words, said)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (b"a eth0 192.0.2.1", b"b eth0 192.0.2.2"),
        (b"a eth0 192.0.2.1", b"a eth0 192.0.2.1"),
        (b"a lo 127.0.0.1", b"b lo 127.0.0.1"),  # the store's own: Slurm's nodes on one machine
    ],
)
def test_ranks_of_a_host_may_share_an_address(store, first, second):
    thread, answers = in_background(store.put, CHECK_IN, "0", first)
    assert store.put(CHECK_IN, "1", second) == (200, b"")
    thread.join()
    assert answers == [(200, b"")]


def test_a_rank_that_never_comes_is_named_to_all():
    store = Store(world_size=4, start_timeout=2)
    waiting = [in_background(store.put, CHECK_IN, rank) for rank in ("0", "3")]
    for thread, _ in waiting:
        thread.join()
    words = "2 of 4 ranks checked in within 2 s; missing: ranks 1, 2"
    assert [answers for _, answers in waiting] == [[(408, words.encode())]] * 2
    assert wait_until(lambda: store.said, lambda: "nothing was said") == [words]
    store.close()


@pytest.mark.parametrize(("scope", "key"), [(CHECK_IN, "{}"), ("global", "rank_{}")])
def test_the_start_timeout_counts_from_the_first_arrival(monkeypatch, scope, key):
    """Ranks may read data for an hour before they all call `hvd.init()`."""
    store = Store(world_size=2, start_timeout=60)
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    monkeypatch.setattr(arrivals, "time", later)
    thread, answers = in_background(store.put, scope, key.format(0))
    wait_until(lambda: store.get(scope, key.format(0))[0] == 200, lambda: "no PUT arrived")
    assert store.put(scope, key.format(1)) == (200, b"")
    thread.join()
    assert answers == [(200, b"")]
    store.close()
    assert store.said == []


def test_ranks_that_are_late_are_named_while_others_wait(monkeypatch):
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.0)
    store = Store(world_size=2, start_timeout=60)
    thread, answers = in_background(store.put, CHECK_IN, "1")
    line = "1 of 2 ranks checked in within 0 s; missing: rank 0; waiting up to 60 s"
    assert wait_until(lambda: store.said, lambda: "nothing was said") == [line]
    assert not answers
    store.put(CHECK_IN, "0")
    thread.join()
    store.close()


@pytest.mark.parametrize("reset", [0, 1])
def test_a_rank_that_ends_is_named_to_those_that_wait_for_it(store, reset):
    """What it watches with is a connection, which the kernel closes with the process."""
    place = (store.endpoint.address, store.endpoint.port)
    with socket.create_connection(place) as watch:
        watch.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))
        watch.sendall(f"GET {store.endpoint.path_prefix}/{ALIVE}/1 HTTP/1.1\r\n\r\n".encode())
        thread, answers = in_background(store.put, "global", "rank_0")
        wait_until(lambda: store.get("global", "rank_0")[0] == 200, lambda: "no PUT arrived")
        assert not answers
    thread.join(timeout=5)
    words = "rank 1 ended before hvd.init(), where others wait for it"
    assert answers == [(408, words.encode())]
    assert wait_until(lambda: store.said, lambda: "nothing was said") == [words]


def test_ranks_are_watched_until_all_have_met(store):
    thread, answers = in_background(store.get, ALIVE, "1")
    for rank in (0, 1):
        in_background(store.put, "global", f"rank_{rank}")
    thread.join(timeout=5)
    assert answers == [(200, b"")]
    assert store.get(ALIVE, "1") == (200, b"")
    assert store.said == []


def test_a_taken_port_is_passed_over():
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(
        ("127.0.0.1", 0)
    ) as s:
        port, free = taken.getsockname()[1], s.getsockname()[1]
        s.close()
        assert Rendezvous("127.0.0.1", 1, "t", print, ports=[port, free]).endpoint.port == free
        with pytest.raises(OSError) as error:
            Rendezvous("127.0.0.1", 1, "t", print, ports=[port])
    text = str(error.value)
    assert text == f"cannot open a rendezvous port on 127.0.0.1: {port} (Address already in use)"


def test_binds_one_address_only(store):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.endpoint.port))


def test_stays_open_for_ranks_that_part_and_meet_again(store):
    for rank in ("0", "1"):
        assert store.endpoint.request("DELETE", "global", rank)[0] == 200
    assert store.put("global", "0", b"address") == (200, b"")
    store.close()
    store.thread.join()
    with pytest.raises(ConnectionRefusedError):
        store.get("global", "0")


def test_ranks_in_words():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([1, 2]) == "ranks 1, 2"
    assert ranks_text(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
