"""Sums over nodes: their leaders, the first rank of each, exchange vectors over TCP connections.

A Horovod collective takes milliseconds on cores that compute; this takes the time on the wire. The
connections are made once, at the start. A leader listens on the interface that Gloo uses until its
partners have connected and shown a token, which Horovod has passed on; nobody can connect later.
The exchange itself is in C++ (native/channel.h): recursive doubling, so that each leader has as
many partners as the logarithm of the number of nodes.
"""

from __future__ import annotations

import ctypes
import functools
import hmac
import os
import selectors
import socket
import struct
import time
import weakref
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import psutil

from . import environment

TOKEN_BYTES = 64  # half of it is shown by who connects, the other half by who is connected to
_SECONDS_TO_CONNECT = 10.0  # altogether
_SECONDS_TO_SPEAK = 3.0  # for who has connected and has not shown the token
_MOST_SILENT = 128  # connections that have not shown it; of more, the first are closed
_HELLO = struct.Struct(f"!{TOKEN_BYTES // 2}sI")  # half a token, and the number of a node

Address = Tuple[str, int]


@functools.lru_cache(maxsize=None)
def library() -> Optional[ctypes.CDLL]:
    """The compiled exchange; None where it cannot be compiled."""
    from ..native import compile  # which imports MXNet

    loaded = compile.load("batch_norm", "", False)
    if loaded is not None:
        loaded.channel_open.restype = ctypes.c_void_p
    return loaded


class Channel:
    """The connections of the leader of node ``node`` of ``nodes``, and sums through them.

    Args:
        sockets: connected to the leaders of :func:`partners`, by node; it takes them over.
    """

    def __init__(self, node: int, nodes: int, sockets: Mapping[int, socket.socket]):
        loaded = library()
        assert loaded is not None
        self._library, self._nodes = loaded, nodes
        integers = ctypes.c_int * len(sockets)
        descriptors = integers(*(opened.detach() for opened in sockets.values()))
        arguments = (
            len(sockets),
            integers(*sockets),
            descriptors,
            ctypes.c_double(environment.patience()),
        )
        self.handle = ctypes.c_void_p(loaded.channel_open(node, nodes, *arguments))
        weakref.finalize(self, loaded.channel_close, self.handle)

    def sum(self, stream: int, call: int, values: np.ndarray) -> int:
        """Replace ``values``, contiguous, float64 or int64, by their sum over nodes; blocks.

        All nodes get the same bits. Streams are independent of each other; within one, calls are
        numbered. Returns 0, or what else :class:`SharedMemorySum` knows.
        """
        address, integer = ctypes.c_void_p(values.ctypes.data), values.dtype == np.int64
        return int(
            self._library.channel_sum(
                self.handle, stream, ctypes.c_int64(call), address, values.size, int(integer)
            )
        )

    def lost(self) -> str:
        """Who was lost, after a sum that could not be made."""
        node, seconds = self._library.channel_lost(self.handle), environment.patience()
        return f"lost node {node} of {self._nodes}: it ended or was silent for {seconds:g} s"

    def abandon(self) -> None:
        """Have all sums of this and of other nodes end, because one cannot be made."""
        self._library.channel_abandon(self.handle)


def partners(node: int, nodes: int) -> List[int]:
    """The nodes with which ``node`` exchanges sums; see ``Channel::sum`` in native/channel.h."""
    bits = nodes.bit_length() - 1
    whole = 1 << bits
    if node >= whole:
        return [node - whole]
    helped = [node + whole] if node + whole < nodes else []
    return [node ^ (1 << bit) for bit in range(bits)] + helped


def own_address() -> str:
    """The address of this host on the interface that Gloo uses.

    Raises:
        OSError: the interface has no address, or there is no route to the rendezvous.
    """
    interface = os.environ.get("HOROVOD_GLOO_IFACE")
    if interface:
        known = psutil.net_if_addrs().get(interface, [])
        for family in (socket.AF_INET, socket.AF_INET6):
            found = [a.address for a in known if a.family == family and "%" not in a.address]
            if found:
                return str(found[0])
        raise OSError(f"HOROVOD_GLOO_IFACE={interface} has no address")
    server = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR") or socket.gethostname()
    family, kind, *_, address = socket.getaddrinfo(server, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # asks the kernel for the route; nothing is sent
        return str(probe.getsockname()[0])


class Listener:
    """Waits for the partners of a leader, on a port that the kernel chooses."""

    def __init__(self, host: str):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=_MOST_SILENT)
        self.address: Address = self._socket.getsockname()[:2]

    def close(self) -> None:
        self._socket.close()

    def meet(self, node: int, addresses: Sequence[Address], token: bytes) -> Channel:
        """Connect the leaders, of which each calls this; nobody can connect afterwards.

        Args:
            addresses: of the listeners of all nodes.
            token: TOKEN_BYTES that only the leaders know.

        Raises:
            OSError: a partner cannot be reached, or none has shown the token in time.
        """
        deadline = time.monotonic() + _SECONDS_TO_CONNECT
        shown, answer = token[: TOKEN_BYTES // 2], token[TOKEN_BYTES // 2 :]
        found: Dict[int, socket.socket] = {}
        known = partners(node, len(addresses))
        try:
            # The kernel accepts connections before the program does, so nobody waits for another.
            for peer in (peer for peer in known if peer < node):
                found[peer] = self._connect(addresses[peer], deadline)
                found[peer].sendall(_HELLO.pack(shown, node))
            higher = {peer for peer in known if peer > node}
            _Door(self._socket, shown, answer).let_in(higher, found, deadline)
            for peer in (peer for peer in known if peer < node):
                _expect(found[peer], answer, deadline)
            for connected in found.values():
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Channel(node, len(addresses), found)
        finally:
            for connected in found.values():
                connected.close()  # unless the channel has taken it over
            self.close()

    def _connect(self, address: Address, deadline: float) -> socket.socket:
        seconds = max(0.1, deadline - time.monotonic())
        try:
            return socket.create_connection(address, seconds, (self.address[0], 0))
        except OSError as error:
            raise OSError(f"no connection to {address[0]}:{address[1]} ({error})") from None


def _expect(connected: socket.socket, answer: bytes, deadline: float) -> None:
    """Read the token's other half, which shows that this is a leader and that it has accepted."""
    received = b""
    while len(received) < len(answer):
        connected.settimeout(max(0.1, deadline - time.monotonic()))
        more = connected.recv(len(answer) - len(received))
        if not more:
            break
        received += more
    if not hmac.compare_digest(received, answer):
        raise OSError(f"{connected.getpeername()[0]} did not accept the connection")


class _Stranger(NamedTuple):
    """A connection that has not shown the token yet."""

    received: bytearray
    until: float


class _Door:
    """Lets awaited nodes in; whoever else connects is dropped, and holds up nobody.

    Args:
        shown: what an awaited node shows.
        answer: what it is then answered.
    """

    def __init__(self, listener: socket.socket, shown: bytes, answer: bytes):
        self._listener, self._shown, self._answer = listener, shown, answer
        self._strangers: Dict[socket.socket, _Stranger] = {}  # in the order of their arrival
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def let_in(self, awaited: Set[int], found: Dict[int, socket.socket], deadline: float) -> None:
        """Add the connections of all ``awaited`` nodes to ``found``.

        Raises:
            OSError: one has not come.
        """
        try:
            while awaited - found.keys():
                if time.monotonic() > deadline:
                    raise OSError("another node did not connect; is there a firewall?")
                for key, _ in self._selector.select(0.1):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.fileobj, awaited, found)
                self._drop_late_ones()
        finally:
            for stranger in list(self._strangers):
                self._forget(stranger).close()
            self._selector.close()

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        connected.setblocking(False)
        self._selector.register(connected, selectors.EVENT_READ)
        until = time.monotonic() + _SECONDS_TO_SPEAK
        self._strangers[connected] = _Stranger(bytearray(), until)

    def _read(self, stranger: Any, awaited: Set[int], found: Dict[int, socket.socket]) -> None:
        received = self._strangers[stranger].received
        try:
            more = stranger.recv(_HELLO.size - len(received))
        except OSError:
            more = b""
        received += more
        if more and len(received) < _HELLO.size:
            return
        self._forget(stranger)
        shown, node = _HELLO.unpack(received.ljust(_HELLO.size))
        if hmac.compare_digest(shown, self._shown) and node in awaited - found.keys():
            stranger.sendall(self._answer)
            found[node] = stranger
        else:
            stranger.close()

    def _drop_late_ones(self) -> None:
        now, too_many = time.monotonic(), len(self._strangers) - _MOST_SILENT
        for number, (connected, stranger) in enumerate(list(self._strangers.items())):
            if number < too_many or now > stranger.until:
                self._forget(connected).close()

    def _forget(self, stranger: socket.socket) -> socket.socket:
        self._selector.unregister(stranger)
        del self._strangers[stranger]
        return stranger
