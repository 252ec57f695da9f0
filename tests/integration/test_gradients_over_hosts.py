"""Gradients of ranks on several hosts, some with several ranks: sums, bits and bytes sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

import launch

from .hosts import Hosts, start_ranks, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def reduced(hosts: Hosts, ranks_of_hosts: Tuple[int, ...]) -> List[List[Dict[str, Any]]]:
    """What each rank of tests/integration/reducing.py tells, by float32 and by float16."""
    command = ["python", "-m", "tests.integration.reducing", "5"]
    environment = {"OMP_NUM_THREADS": "1", "HOROVOD_GLOO_TIMEOUT_SECONDS": "20"}
    running = start_ranks(hosts, ranks_of_hosts, command, environment)
    told = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), told
    each = [[json.loads(line) for line in text.strip().splitlines()[-2:]] for text in told]
    return [list(way) for way in zip(*each)]


@pytest.mark.parametrize("ranks_of_hosts", [(1, 1), (2, 2), (1, 1, 1), (3, 1, 2)])
def test_sums_are_right_and_every_run_has_the_same_bits(tmp_path, ranks_of_hosts):
    """On every rank; a host sends its gradients once, however many ranks it has.

    Two hosts' sums cannot differ from run to run: a + b is b + a. One run shows that there.
    """
    count = len(ranks_of_hosts)
    with Hosts(count, tmp_path) as hosts:
        runs = [reduced(hosts, ranks_of_hosts) for _ in range(2 if count > 2 else 1)]
    for number, off, width in ((0, 2e-6, 1), (1, 2e-3, 2)):
        ranks = [rank for run in runs for rank in run[number]]
        assert {rank["on_node"] for rank in ranks} == {max(ranks_of_hosts) > 1}
        assert max(rank["off"] for rank in ranks) < off
        assert len({rank["weights"] for rank in ranks}) == 1
        ring = 2 * (count - 1) / count * ranks[0]["gradient_bytes"] / width
        sent = max(rank["sent"] for rank in ranks)
        assert 0.9 * ring < sent < 1.2 * ring + 50_000
    told = runs[0][0]
    assert len({rank["broadcast"] for rank in told}) == 1
    firsts = [told[sum(ranks_of_hosts[:host])] for host in range(count)]
    needed = (count - 1) * told[0]["bytes"]
    assert needed <= sum(rank["passed_on"] for rank in firsts) < 1.2 * needed + 50_000
    if ranks_of_hosts == (2, 2):  # where ranks are changes rounding alone
        (folder := tmp_path / "apart").mkdir()
        with Hosts(4, folder) as hosts:
            apart = [reduced(hosts, (1, 1, 1, 1)) for _ in range(2)]
        assert len({rank["weights"] for run in apart for rank in run[0]}) == 1
        assert runs[0][0][0]["sum"] == pytest.approx(apart[0][0][0]["sum"], rel=1e-5)


def trace_of_a_step(path: str) -> None:
    """A rank that writes Horovod's timeline of ten steps, after three, of four buckets."""
    import mxnet as mx
    from mxnet.gluon import nn

    from trainer import config, dist
    from trainer.dist import ranks
    from trainer.model import prepare
    from trainer.step.gradients import reduce_and_update
    from trainer.step.optimizer import make_trainer

    ranks.allow_timeline()
    dist.init()
    net = nn.HybridSequential()
    for _layer in range(6):
        net.add(nn.Dense(1000, in_units=1000, use_bias=False))
    through_horovod = {"shared_memory": False, "bucket_mb": 4}
    settings = config.from_dict({"optimizer": through_horovod, "data": {"image_size": 32}})
    prepare.prepare_net(net, settings, (1, 25, 40), mx.cpu())
    trainer = make_trainer(net, settings.optimizer)

    def step() -> None:
        with mx.autograd.record():
            loss = net(mx.nd.ones((512, 1, 25, 40))).mean()
        loss.backward()
        reduce_and_update(trainer, None, want_norm=False)
        mx.nd.waitall()

    for _step in range(3):
        step()
    with ranks.timeline(path):
        for _step in range(10):
            step()
    dist.shutdown()


def test_allreduce_and_backward_overlap_on_horovods_timeline(tmp_path: Path) -> None:
    """The last layers' bucket is on its way before backward has made the first layers'.

    In one of ten steps at least: on busy cores the thread that sends may come late.
    """
    path = tmp_path / "timeline.json"
    launch.run(trace_of_a_step, (str(path),), ranks=2)
    names: Dict[int, str] = {}
    began: Dict[Tuple[str, str], List[int]] = {}
    for event in json.loads(path.read_text()):
        if event.get("name") == "process_name":
            names[event["pid"]] = event["args"].get("name", "").split(".")[-1]
        elif event["ph"] == "B":
            began.setdefault((names[event["pid"]], event["name"]), []).append(event["ts"])
    steps = list(zip(began["0", "GLOO_ALLREDUCE"], began["3", "NEGOTIATE_ALLREDUCE"]))
    assert len(steps) == 10 and any(sent < made for sent, made in steps), began
