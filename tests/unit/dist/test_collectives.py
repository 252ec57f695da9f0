"""With what Horovod is started."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any, Dict, List

import mxnet as mx
import numpy as np
import pytest

from trainer.dist import collectives, environment, ranks, shared_memory, small_sums
from trainer.errors import ConfigError

Layout = Dict[str, str]


def started(monkeypatch: pytest.MonkeyPatch, layout: Layout, **asked: bool) -> Any:
    """(process sets, cycle time in ms) that Horovod is given."""
    given: List[Any] = []

    class Horovod:
        def is_initialized(self) -> bool:
            return bool(given)

        def init(self, process_sets: Any = None) -> None:
            given.append(process_sets)

        def size(self) -> int:
            return environment.size()

    monkeypatch.setattr(collectives, "horovod", Horovod)
    monkeypatch.setattr(collectives, "way", lambda: None)
    monkeypatch.setattr(shared_memory, "possible", lambda: True)
    for name in ("FUSION_THRESHOLD", "CYCLE_TIME"):
        monkeypatch.setenv(f"HOROVOD_{name}", "")  # so that it is put back
        monkeypatch.delenv(f"HOROVOD_{name}")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "node1")
    for name, value in layout.items():
        monkeypatch.setenv(name, value)
    collectives.init(**asked)
    return given[0], float(collectives.os.environ.get("HOROVOD_CYCLE_TIME", "1"))


def layout(size: int, local_size: int, cross_size: int, threads: int) -> Layout:
    """What a launcher tells a rank."""
    sizes = {"SIZE": size, "LOCAL_SIZE": local_size, "CROSS_SIZE": cross_size}
    told = {f"HOROVOD_{name}": str(value) for name, value in sizes.items()}
    return {**told, "HOROVOD_RANK": "0", "OMP_NUM_THREADS": str(threads)}


@pytest.mark.parametrize(
    ("told", "in_memory", "process_sets", "cycle"),
    [
        (layout(2, 2, 1, 1), True, None, 100),
        (layout(2, 2, 1, 1), False, None, 10),
        (layout(2, 1, 2, 1), True, None, 10),
        (layout(2, 1, 2, 4), True, None, 2.5),
        (layout(2, 1, 2, 64), True, None, 1),
        (layout(4, 2, 2, 1), True, "dynamic", 10),
        (layout(3, 1, 2, 1), True, "dynamic", 10),  # the lone rank of a node beside one of two
    ],
)
def test_horovods_idle_rounds_take_no_more_of_the_cores_than_they_must(
    told: Layout, in_memory: bool, process_sets: Any, cycle: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started(monkeypatch, told, steps_in_memory=in_memory) == (process_sets, cycle)


def test_where_the_program_began_horovod_without_process_sets_only_those_of_nodes_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in layout(4, 2, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOROVOD_DYNAMIC_PROCESS_SETS", raising=False)
    monkeypatch.setattr(collectives, "local_size", lambda: 2)
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    assert collectives.leaders_process_set.__wrapped__() is None
    with pytest.raises(ConfigError, match=r'call hvd.init\(process_sets="dynamic"\), or leave'):
        collectives.node_process_set.__wrapped__()


def test_a_program_that_ends_with_sums_under_way_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_exit: List[Any] = []
    monkeypatch.setattr(collectives.atexit, "register", at_exit.append)
    started(monkeypatch, layout(2, 2, 1, 1))
    done: List[bool] = []
    monkeypatch.setattr(mx.nd, "waitall", lambda: time.sleep(0.1) or done.append(True))
    at_exit[-1]()  # the last comes first, and Horovod's is there since it was started
    assert done
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
    at_exit[-1]()
    assert len(done) == 1  # a rank that has failed does not wait for its peers


def test_a_cycle_time_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "3")
    given = started(monkeypatch, {**layout(2, 1, 2, 1), "HOROVOD_CYCLE_TIME": "3"})
    assert given == (None, 3)


def test_ranks_on_gpus_leave_horovods_cycle_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "visible_gpus", lambda: 8)
    assert started(monkeypatch, layout(16, 8, 2, 1)) == ("dynamic", 1)
    monkeypatch.undo()
    monkeypatch.setattr(collectives, "visible_gpus", lambda: 8)
    assert started(monkeypatch, layout(16, 8, 2, 1), on_cpu=True) == ("dynamic", 10)


@pytest.mark.parametrize(("ranks", "through"), [(1, ""), (2, "memory"), (2, "Horovod")])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (1.5, float),
        (3, int),
        (np.zeros((2, 0)), float),
        (np.array([2, 3], np.int16), np.int16),
        ([1.5, 2.0], float),
        (np.float32(2), np.float32),
        (mx.nd.ones(2), "f"),
    ],
)
def test_numbers_lists_and_arrays_of_mxnet_are_added_up(
    monkeypatch: pytest.MonkeyPatch, ranks: int, through: str, given: Any, dtype: Any
) -> None:
    class Sums:
        capacity = 2

        def __call__(self, part: np.ndarray) -> np.ndarray:
            return ranks * part

    monkeypatch.setattr(collectives, "world_size", lambda: ranks)
    monkeypatch.setattr(collectives, "small_sums", Sums if through == "memory" else lambda: None)
    horovod = SimpleNamespace(allreduce=lambda tensor, average, name: ranks * tensor)
    monkeypatch.setattr(small_sums, "horovod", lambda: horovod)
    own = np.array(getattr(given, "asnumpy", lambda: given)())
    total = collectives.allreduce_sum(given, "test")
    assert total.dtype == dtype and total.shape == own.shape and (total == ranks * own).all()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("given", [True, np.ones(2) > 0, 2**70, 1j, "x", None, [[1], [1, 2]], {1}])
@pytest.mark.filterwarnings("ignore::numpy.VisibleDeprecationWarning")
def test_what_is_no_number_is_refused_on_one_rank_too(
    monkeypatch: pytest.MonkeyPatch, ranks: int, given: Any
) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: ranks)
    with pytest.raises(TypeError, match=r"test is of .*; give numbers, booleans by .astype\(int\)"):
        collectives.allreduce_sum(given, "test")


def test_a_rank_that_is_alone_gets_a_copy() -> None:
    """On several it may be changed without a change of what was given."""
    given = np.ones(2)
    total = collectives.allreduce_sum(given, "test")
    total /= 2
    assert given.tolist() == [1, 1]


def test_before_the_ranks_have_joined_the_call_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr(ranks, "horovod", lambda: away)
    for asks in (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_size, ranks.is_root):
        with pytest.raises(RuntimeError, match=r"call trainer.dist.init\(\) first"):
            asks()


def test_parameters_are_broadcast_by_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hvd.broadcast_parameters` takes them."""
    seen: List[Any] = []
    monkeypatch.setattr(collectives, "_broadcast_", lambda array, name: seen.append(array))
    net = mx.gluon.nn.Dense(2, in_units=3)
    net.initialize()
    named = net.collect_params()
    for given in (named, dict(named.items()), list(named.values())):
        collectives.broadcast_parameters(given)
    assert len(seen) == 6
