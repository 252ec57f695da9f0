"""Small sums between hosts, whose leaders die, stand still or lose their link."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, Tuple

import pytest

from launch.core.process import lacks_cause
from tests.waiting import wait_until

from .hosts import Hosts, start_ranks, why_not

SUMMING = Path(__file__).with_name("summing.py")
TIMEOUT = 4  # seconds that a rank may be silent
REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Job:
    """Ranks that make sums, two hosts with two each; their output is in files."""

    def __init__(self, hosts: Hosts, folder: Path, way: str, ranks: Tuple[int, ...] = (2, 2)):
        self._log = folder / "log"
        to_file = 'exec "$@" > "$0.$HOROVOD_RANK" 2>&1'
        command = ["sh", "-c", to_file, str(self._log), sys.executable, str(SUMMING), way]
        environment = {
            "HOROVOD_GLOO_TIMEOUT_SECONDS": str(TIMEOUT),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ".",
        }
        self.ranks = start_ranks(hosts, ranks, command, environment)

    def said(self, rank: int) -> str:
        path = Path(f"{self._log}.{rank}")
        return path.read_text() if path.exists() else ""

    def wait_for_sums(self) -> None:
        """Until one is made that has not been begun."""
        before = self.said(0).count("sum ") + 2
        wait_until(lambda: self.said(0).count("sum ") >= before, lambda: self.everything())

    def everything(self) -> str:
        return "\n".join(self.said(rank) for rank in range(len(self.ranks)))

    def signal(self, rank: int, number: int) -> None:
        self.ranks[rank].send_signal(number)

    def why_it_gave_up(self, rank: int, seconds: float = TIMEOUT + 30) -> str:
        assert self.ranks[rank].wait(seconds), self.everything()
        (why,) = re.findall("gave up: (.*)", self.said(rank)) or [self.everything()]
        assert lacks_cause(True, [why]), "the launcher names another rank"
        return str(why)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(2, tmp_path) as made:
        yield made


ENDED, STOPPED = "ended before its turn", "has been stopped"
LOST, TOLD = "lost node", "this node's first rank lost another"
# A signal to a rank, and what its peers say. Ranks 0 and 2 are the leaders of their hosts.
FAULTS: Dict[str, Tuple[int, int, Dict[int, str]]] = {
    "leader killed": (2, signal.SIGKILL, {0: LOST, 1: TOLD, 3: ENDED}),
    "another killed": (3, signal.SIGKILL, {0: LOST, 1: TOLD, 2: ENDED}),
    "leader stopped": (0, signal.SIGSTOP, {1: STOPPED, 2: LOST, 3: TOLD}),
    "another stopped": (1, signal.SIGSTOP, {0: STOPPED, 2: LOST, 3: TOLD}),
}
# All of them in C++; in Python, whose waits are told the same way, each kind and each level once.
WAYS = [(fault, "operator") for fault in FAULTS]
WAYS += [("leader killed", "python"), ("another stopped", "python")]


@pytest.mark.parametrize(("fault", "way"), WAYS)
def test_a_rank_that_dies_or_stops_ends_the_others(
    fault: str, way: str, hosts: Hosts, tmp_path: Path
) -> None:
    job = Job(hosts, tmp_path, way)
    job.wait_for_sums()
    rank, number, expected = FAULTS[fault]
    job.signal(rank, number)
    for peer, why in expected.items():
        assert why in job.why_it_gave_up(peer), job.everything()


@pytest.mark.parametrize("way", ["python", "operator"])
def test_a_short_cut_of_the_link_is_survived_and_a_long_one_ends_all(
    way: str, hosts: Hosts, tmp_path: Path
) -> None:
    job = Job(hosts, tmp_path, way)
    job.wait_for_sums()
    hosts.cut("h2")
    time.sleep(1)
    hosts.mend("h2")
    job.wait_for_sums()
    hosts.cut("h2")
    for rank, why in {0: LOST, 1: TOLD, 2: LOST, 3: TOLD}.items():
        assert why in job.why_it_gave_up(rank), job.everything()


WITHOUT = {
    "no way between the hosts": (
        "channel.own_address = lambda: psutil.net_if_addrs()['spare'][0].address",
        r"rank [01] on h[12]: (no connection to 10\.78\.1\.1:\d+|another node did not connect).*",
    ),
    "no compiler": ("channel.library = lambda: None", "rank 0 on h1: no C\\+\\+"),
}
BY_HOROVOD = """
import psutil
from trainer import dist
from trainer.dist import channel
channel._SECONDS_TO_CONNECT = 2
{}
dist.init()
assert not dist.sums_are_cheap()
assert dist.gather_objects(dist.rank()) == [0, 1]
assert dist.any_rank(dist.rank() == 1, "any")
dist.shutdown()
"""


@pytest.mark.parametrize("reason", WITHOUT)
def test_where_the_leaders_cannot_connect_horovod_adds_up_and_a_line_says_so(
    reason: str, hosts: Hosts
) -> None:
    change, why = WITHOUT[reason]
    command = [sys.executable, "-c", BY_HOROVOD.format(change)]
    ranks = start_ranks(hosts, (1, 1), command, {"OMP_NUM_THREADS": "1"})
    first, second = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], first + second
    said = [line for line in first.splitlines() if "Warning" not in line and "warn" not in line]
    assert re.fullmatch(f"small sums go through Horovod, which is slower: {why}", "\n".join(said))
    assert "which is slower" not in second
