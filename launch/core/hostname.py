"""Overrides the host name that Gloo sees, where the real one resolves to a wrong address.

Horovod 0.28.1 honours HOROVOD_GLOO_IFACE only for the first connections of `hvd.init()`. Those of
process sets (the global one included) use the address to which the host's own name resolves: with
Debian's `127.0.1.1 <host>` line in /etc/hosts, one that other hosts cannot reach. A host name may
be an address, so a rank can be given one that resolves correctly, in its own UTS namespace,
without affecting the host.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path
from typing import Optional

_CLONE_NEWUTS = 0x04000000  # <linux/sched.h>
_CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


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
    _check(_libc.unshare(_CLONE_NEWUTS | (_CLONE_NEWUSER if user else 0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    socket.sethostname(name)


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"no namespace for a host name of its own: {os.strerror(error)}")
