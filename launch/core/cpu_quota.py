"""The CPU quota of this process's control group, as `docker run --cpus` and Kubernetes set it.

Unlike a CPU set, a quota does not show in the affinity: a container of 2 CPUs on a node of 64 sees
64, and with as many threads most of them stand throttled.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Iterator, Optional

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def quota_cores(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> Optional[int]:
    """The smallest quota of this process's control group and those above it, rounded up to cores.

    None without a quota. Version 1 and 2 of control groups are read; `mount` is where they are
    mounted, `membership` the kernel's file on this process.
    """
    quotas = [q for folder in _folders(mount, membership) for q in (_quota(folder),) if q]
    return math.ceil(min(quotas)) if quotas else None


def _folders(mount: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups with the CPU controller, and those above them.

    In a container a path may be the host's, which is not mounted there; the mount itself is then
    the container's group.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)  # 4:cpu,cpuacct:/path, or 0::/path in version 2
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / controllers if controllers else mount
        if controllers and (mount / "cpu").exists():  # a link; the kernel of EL 7 says cpuacct,cpu
            top = mount / "cpu"
        own = top / path.lstrip("/")
        yield from (f for f in (own, *own.parents) if f == top or top in f.parents)


def _quota(folder: Path) -> Optional[float]:
    """The quota that is set in this folder, in cores; None if there is none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()  # `max 100000` is no limit
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()  # -1 is no limit
            period = (folder / "cpu.cfs_period_us").read_text()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None
