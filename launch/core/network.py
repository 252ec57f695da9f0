"""Addresses: of this machine on the route to another host, and of a job's store.

By default Gloo uses the address to which the host's own name resolves; with Debian's
`127.0.1.1 <host>` line in /etc/hosts no other host can reach that. Horovod 0.28.1 honours
HOROVOD_GLOO_IFACE only for the first connections of `hvd.init()`, not for those of process sets
(the global one included). A host name may be an address, so a rank can be given one that resolves
correctly, in its own UTS namespace, without affecting the host.

Horovod's client does not support tokens, but builds its URLs as `http://ADDR:PORT/scope/key`. With
`ADDR = 10.0.0.1:29400/TOKEN` that reads `http://10.0.0.1:29400/TOKEN:29400/scope/key`, so the
token travels as the first part of the path.
"""

from __future__ import annotations

import ctypes
import hmac
import http.client
import os
import secrets
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import psutil

from .process import say

_CLONE_NEWUTS = 0x04000000  # <linux/sched.h>
_CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)

LOOPBACK = "127.0.0.1"
PROVE = "prove"
"""In place of the token, in requests for a proof that the server knows it."""


def address_towards(host: str) -> str:
    """The IPv4 address of this machine on the route to `host` (a name or an address).

    Nothing is sent: connecting a UDP socket only asks the kernel for the route. Raises OSError if
    `host` does not resolve or there is no route to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def addresses_of(name: str) -> List[str]:
    """The IPv4 addresses of a host, those that have a route first; socket.gaierror without any."""
    found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def addresses_by_interface() -> Dict[str, List[str]]:
    """The IPv4 addresses of each interface that has any."""
    found = {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def interface_of(address: str) -> str:
    """Name of the interface that holds the local IPv4 `address`."""
    for name, addresses in addresses_by_interface().items():
        if address in addresses:
            return name
    if address.startswith("127.") and address != "127.0.0.1":
        return interface_of("127.0.0.1")  # all of 127.0.0.0/8 belongs to the loopback interface
    hint = ""
    if address == "127.0.0.1":
        loopback = psutil.net_if_stats().get("lo")
        missing = "addr add 127.0.0.1/8 dev lo" if loopback and loopback.isup else "link set lo up"
        hint = f", by which ranks find each other: `ip {missing}`"
    raise ValueError(f"no interface of this machine has the address {address}{hint}")


def interface_towards(address: str) -> str:
    """HOROVOD_GLOO_IFACE, or else the interface on the route to `address`.

    Raises ValueError, with a list of those that have an IPv4 address, if that has none.
    """
    known, name = addresses_by_interface(), os.environ.get("HOROVOD_GLOO_IFACE")
    if not name:
        return interface_of(address if address.startswith("127.") else address_towards(address))
    if name not in known:
        choices = ", ".join(f"{n} ({', '.join(a)})" for n, a in sorted(known.items()))
        raise ValueError(
            f"HOROVOD_GLOO_IFACE={name}: {socket.gethostname()} has no such interface with an "
            f"IPv4 address, only {choices}; name one of these, or unset it to follow the route"
        )
    return name


def address_of_own_name() -> Optional[str]:
    """The address that Gloo uses for this host's name: the first resolved one that can be bound.

    None if there is none.
    """
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):  # Linux allows a label longer than DNS does
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return str(address[0])
    return None


def take_hostname(name: str) -> None:
    """Sets the host name seen by this process and its children; the host keeps its own.

    Raises OSError where unprivileged users cannot create namespaces. The process must not have
    started threads yet.
    """
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_CLONE_NEWUTS | (_CLONE_NEWUSER if user else 0)):
        error = ctypes.get_errno()
        raise OSError(error, f"no namespace for a host name of its own: {os.strerror(error)}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    socket.sethostname(name)


def make_own_name_lead_to(address: str, interface: str, several_nodes: bool) -> None:
    """Makes this host's own name resolve to the address of an interface.

    On one node any that it leads to will do. Call it before any thread starts, and once for all
    ranks of a launcher: those in namespaces of their own would not see into each other.

    Raises:
        ValueError: users may create no namespaces, and ranks would not find each other.
    """
    own = address_of_own_name()
    if own == address or (own and not several_nodes):
        return
    try:
        take_hostname(address)
    except OSError as error:
        name = socket.gethostname()
        found = f"{name}, this host's own name, leads to {own or 'no address'}, not to {address}"
        if not own or own.startswith("127."):
            raise ValueError(
                f"{found}, and Horovod goes by it: correct its line of /etc/hosts, or add "
                f"`{address} {name}` ({error})"
            ) from None
        say(f"{found} on {interface}: part of the traffic will go there ({error})")


@dataclass(frozen=True)
class Endpoint:
    """The address of a job's store, and its token."""

    address: str
    port: int
    token: str

    def environment(self) -> Dict[str, str]:
        """The environment variables that lead Horovod to the store."""
        return {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{self.address}:{self.port}/{self.token}",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(self.port),
        }

    @property
    def path_prefix(self) -> str:
        return f"/{self.token}:{self.port}"

    def request(
        self, method: str, scope: str, key: str, value: bytes = b"", timeout: Optional[float] = 5.0
    ) -> Tuple[int, bytes]:
        """Status and body of one request; raises OSError or HTTPException without an answer.

        Not by urllib, which would send the request through the site's HTTP proxy.
        """
        connection = http.client.HTTPConnection(self.address, self.port, timeout=timeout)
        try:
            connection.request(method, f"{self.path_prefix}/{scope}/{key}", body=value)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def knows_token(self, timeout: float) -> bool:
        """Whether it is this job's store that answers, which is not told the token by asking.

        Raises OSError or HTTPException without an answer.
        """
        nonce = secrets.token_hex(16)
        _, proof = replace(self, token=PROVE).request("GET", nonce, "", timeout=timeout)
        return hmac.compare_digest(proof, self.proof(nonce))

    def proof(self, nonce: str) -> bytes:
        """What shows to who knows the token that this port's server does too."""
        text = f"{self.address} {self.port} {nonce}"
        return hmac.new(self.token.encode(), text.encode(), "sha256").hexdigest().encode()
