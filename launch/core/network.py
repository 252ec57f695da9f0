"""Finds the address and the network interface on the route to another host.

By default Gloo uses the address to which the host's own name resolves; with Debian's
`127.0.1.1 <host>` line in /etc/hosts no other host can reach that.
"""

from __future__ import annotations

import socket
from typing import Dict, List

import psutil


def address_towards(host: str) -> str:
    """The IPv4 address of this machine on the route to `host` (a name or an address).

    Nothing is sent: connecting a UDP socket only asks the kernel for the route. Raises OSError if
    `host` does not resolve or there is no route to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


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
    hint = "; turn it on: `ip link set lo up`" if address == "127.0.0.1" else ""
    raise ValueError(f"no interface of this machine has the address {address}{hint}")


def check_interface(name: str) -> str:
    """Returns `name` if that interface has an IPv4 address; else a ValueError lists those."""
    known = addresses_by_interface()
    if name not in known:
        choices = ", ".join(f"{n} ({', '.join(a)})" for n, a in sorted(known.items()))
        raise ValueError(
            f"HOROVOD_GLOO_IFACE={name}: {socket.gethostname()} has no such interface with an "
            f"IPv4 address, only {choices}; name one of these, or unset it to follow the route"
        )
    return name
