"""The rendezvous store in which the ranks of a job find each other, without ssh or MPI.

It is horovodrun's key-value store over HTTP with three additions: it binds a single address,
accepts only requests with the job's token, and holds early ranks until the last one has arrived. It
stays open as long as the job: a program whose run has failed on all ranks may meet again, hours
later, for another. It is plain HTTP: the network must be trusted.
"""

from __future__ import annotations

import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple

try:
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        f"{_missing}; Horovod has no wheel, so build it in this environment, after MXNet: "
        "`HOROVOD_WITH_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 "
        "HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 "
        "pip install --no-build-isolation horovod==0.28.1` (it needs cmake < 4, make and g++ < 14)"
    ) from None

from .arrivals import CHECK_IN, HELD_KEYS, Arrivals, MissingRanksError
from .network import PROVE, Endpoint

START_TIMEOUT_SECONDS = 600.0

NOTICE_SECONDS = 10.0
"""After this time the store says which ranks have not checked in yet."""

CONNECT_SECONDS = 10.0
"""How long ranks that know each other's addresses may take to connect before a warning. Gloo
itself gives up after HOROVOD_GLOO_TIMEOUT_SECONDS (30)."""

MOST_SILENT = 128
"""Connections that have not shown the token yet; of more, the first are closed."""

SECONDS_TO_SPEAK = 5.0
"""Time for a connection to show the token."""

ALIVE = "alive"
"""Scope of requests that are answered when all ranks have called `hvd.init()`. The kernel closes
the connection of a rank that ends before."""


class Rendezvous(RendezvousHTTPServer):
    """The store of one job, bound to one address; `serve` answers until `close`.

    `ports` are tried in turn (0 lets the kernel choose); raises OSError if none is free. `say` is
    called with each message for the user, one line.
    """

    allow_reuse_address = False
    daemon_threads = True
    request_queue_size = 1024  # a thousand ranks may connect at once
    timeout = 0.2  # seconds that `handle_request` waits

    def __init__(
        self,
        address: str,
        world_size: int,
        token: str,
        say: Callable[[str], None],
        ports: Iterable[int] = (0,),
        start_timeout: float = START_TIMEOUT_SECONDS,
    ) -> None:
        refusals = []
        for port in ports:
            try:
                super().__init__((address, port), _Handler, verbose=0)
                break
            except OSError as error:
                refusals.append(f"{port} ({error.strerror})")
        else:
            tried = ", ".join(refusals)
            raise OSError(f"cannot open a rendezvous port on {address}: {tried}")
        self.endpoint = Endpoint(address, self.server_address[1], token)
        self.arrivals = Arrivals(world_size, start_timeout)
        self.say = say
        self.connected: Set[str] = set()  # ranks that have connected the global context
        self._world_size = world_size
        self._start_timeout = start_timeout
        self._watched: List[socket.socket] = []
        self._said: Set[str] = set()
        self._silent: Dict[socket.socket, float] = {}  # connections, and until when they may be so
        self._closed = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def serve(self) -> None:
        """Answers until `close`.

        Warns when ranks wait for others beyond the timeout, or cannot connect to each other.
        """
        while not self._closed.is_set():
            self.handle_request()
            self.service_actions()
            if self.arrivals.overdue(CHECK_IN, NOTICE_SECONDS):
                late = self.arrivals.explain(CHECK_IN, NOTICE_SECONDS)
                self.say_once("late", f"{late}; waiting up to {self._start_timeout:g} s")
            for scope in HELD_KEYS:
                if self.arrivals.overdue(scope, self._start_timeout):
                    self.say_once(scope, self.arrivals.explain(scope, self._start_timeout))
            if self.arrivals.absent():
                self.say_once("absent", self.arrivals.absent())
            if self.arrivals.seconds_since_complete("global") > CONNECT_SECONDS:
                self._warn_of_interfaces()
        self.server_close()

    def serve_in_thread(self) -> None:
        self._thread = threading.Thread(target=self.serve, name="rendezvous", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving and joins the serving thread; request handlers end on their own."""
        self._closed.set()
        self.arrivals.close()
        if self._thread is not None:
            self._thread.join()

    def _warn_of_interfaces(self) -> None:
        missing = self._world_size - len(self.connected)
        if missing <= 0:
            return
        places = self.cache.get(CHECK_IN, {})  # "host interface address" of each rank
        offered = "; ".join(sorted({place.decode() for place in places.values()})) or "loopback"
        self.say_once(
            "interfaces",
            f"{missing} of {self._world_size} ranks have not connected to all others within "
            f"{CONNECT_SECONDS:g} s, over the interfaces: {offered}; is one of them wrong "
            "(HOROVOD_GLOO_IFACE), or is there a firewall between the hosts?",
        )

    def refuse_shared_addresses(self) -> None:
        """Raises MissingRanksError where hosts offer one address, at which each meets itself.

        The store's own is that of one machine, which Slurm may take for several nodes.
        """
        hosts: Dict[str, str] = {self.endpoint.address: ""}
        for place in self.cache.get(CHECK_IN, {}).values():
            host, interface, address = place.decode().split()
            if hosts.setdefault(address, host) not in ("", host):
                raise MissingRanksError(
                    f"{hosts[address]} and {host} both have the address {address} on {interface}, "
                    "so ranks would not find each other: HOROVOD_GLOO_IFACE must name an interface "
                    "of the network between them; or unset it to follow the route"
                )

    def process_request(self, request: Any, client_address: Any) -> None:
        """A connection has been accepted; closes the first ones of too many silent ones."""
        self._silent[request] = time.monotonic() + SECONDS_TO_SPEAK
        for late in list(self._silent)[:-MOST_SILENT]:
            self._drop(late)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        now = time.monotonic()
        for silent, until in list(self._silent.items()):
            if now > until:
                self._drop(silent)

    def _drop(self, connection: socket.socket) -> None:
        self.admit(connection)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # which ends its thread

    def admit(self, connection: socket.socket) -> None:
        """It has shown the token, or is closed."""
        self._silent.pop(connection, None)

    def shutdown_request(self, request: Any) -> None:
        self.admit(request)
        super().shutdown_request(request)

    def watch(self, rank: int, connection: socket.socket) -> None:
        """Returns when all ranks have called `hvd.init()`, or this one has closed `connection`."""
        self._watched.append(connection)
        if self.arrivals.missing("global"):
            with suppress(OSError):  # a rank that is killed may reset it
                connection.settimeout(None)
                connection.recv(1)
        self.arrivals.end(rank)

    def end_watches(self) -> None:
        while self._watched:
            with suppress(OSError, IndexError):  # the rank has gone; another thread took the last
                self._watched.pop().shutdown(socket.SHUT_RD)

    def say_once(self, topic: str, message: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            self.say(message)

    def turn_away(self, host: str) -> None:
        self.say_once(
            host, f"{host} spoke to the rendezvous port without this job's token; ignored"
        )

    def handle_error(self, request: object, client_address: Tuple[str, int]) -> None:
        """Ignores clients that hang up; reports other errors in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.say(f"rendezvous request from {client_address[0]} failed: {error!r}")


class _Handler(RendezvousHandler):
    """Horovod's handler with a token check and held PUTs."""

    server: Rendezvous
    path: str

    def send_error(self, code: int, message: Optional[str] = None, explain: object = None) -> None:
        """Called for requests that are not HTTP at all."""
        self.server.turn_away(self.client_address[0])

    def do_GET(self) -> None:  # noqa: N802
        if not self._admitted():
            return
        _, scope, key = self.path.split("/")
        if scope == ALIVE:
            self.server.watch(int(key), self.connection)
            self._answer(200, b"")
        else:
            super().do_GET()

    def do_DELETE(self) -> None:  # noqa: N802
        if self._admitted():
            _, scope, key = self.path.split("/")
            super().do_DELETE()
            if scope == "global":
                self.server.connected.add(key)

    def do_PUT(self) -> None:  # noqa: N802
        if self._admitted():
            try:
                super().do_PUT()
            except MissingRanksError as error:
                self._answer(408, str(error).encode())
            finally:
                self.server.arrivals.answered(self.path)

    def _put_value(self, scope: str, key: str, value: bytes) -> None:
        super()._put_value(scope, key, value)
        pattern = HELD_KEYS.get(scope)
        if pattern and key.startswith(pattern.format(rank="")):
            rank = key[len(pattern.format(rank="")) :]
            if rank.isdigit():
                try:
                    self.server.arrivals.arrive_and_wait(scope, int(rank))
                    if scope == CHECK_IN:
                        self.server.refuse_shared_addresses()
                finally:
                    if scope == CHECK_IN and rank == "0":  # with it the store may end
                        self.server.arrivals.wait_for_answers(scope)
                if scope == "global":
                    self.server.end_watches()

    def _admitted(self) -> bool:
        """Strips the token from the path; answers 403 if it is wrong."""
        prefix = self.server.endpoint.path_prefix
        if self.path.startswith(f"/{PROVE}:") and self.command == "GET":
            self._answer(200, self.server.endpoint.proof(self.path.split("/")[-2]))
            return False
        given = self.path[: len(prefix)]
        if not secrets.compare_digest(given.encode(), prefix.encode()):
            self.server.turn_away(self.client_address[0])
            self._answer(403, b"wrong token")
            return False
        self.path = self.path[len(prefix) :]
        self.server.admit(self.connection)
        return True

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
