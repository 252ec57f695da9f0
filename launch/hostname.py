"""The host name that Gloo sees, where the real one leads astray.

Horovod 0.28.1 honours HOROVOD_GLOO_IFACE only for the connections that `hvd.init()` makes first.
Those of process sets (and all ranks together are one) offer the address that the host's own name
resolves to: with Debian's `127.0.1.1 <host>` line in /etc/hosts, one that no other host reaches.
As `gethostname()` may as well return an address, a rank can be given a name that resolves rightly,
in a namespace of its own that nothing else on the host notices.
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
    """The address that Gloo takes for this host's name: the first that it resolves to and that
    can be bound. None when there is none."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
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
    """Gives this process, and those that it starts, the host name `name`; the host keeps its own.

    Raises OSError where the system allows ordinary users no namespaces. The process must not have
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
