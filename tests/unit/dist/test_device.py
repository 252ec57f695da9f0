"""Choice of device and threads. There is no GPU here: the driver's answers are faked."""

from __future__ import annotations

import os
import subprocess
import sys

import mxnet as mx
import pytest

from tests.documents import ROOT
from trainer.dist import device
from trainer.errors import ConfigError


@pytest.fixture
def usable(monkeypatch):
    """Every GPU that is named can be computed on."""

    class Array:
        def wait_to_read(self):
            pass

    monkeypatch.setattr(mx.nd, "ones", lambda *_, **__: Array())


def line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_cpu_is_the_cpu_whatever_there_is(gpus):
    assert device.choose("cpu", 3, gpus) == mx.cpu()


def test_auto_without_gpus_is_the_cpu():
    assert device.choose("auto", 0, 0) == mx.cpu()


def test_auto_asks_mxnet_what_there_is(usable, monkeypatch):
    for gpus, chosen in ((0, mx.cpu()), (1, mx.gpu(0))):
        monkeypatch.setattr(mx.context, "num_gpus", lambda gpus=gpus: gpus)
        assert device.choose("auto", 0) == chosen


def test_gpu_without_gpus_says_what_to_do():
    with pytest.raises(ConfigError) as error:
        device.choose("gpu", 0, 0)
    text = line(error)
    assert "device is gpu" in text and "device=cpu" in text and "GPU=1" in text


@pytest.mark.parametrize("asked", ["auto", "gpu"])
def test_ranks_of_a_node_take_its_gpus_in_turn(usable, asked):
    assert [device.choose(asked, rank, 4) for rank in range(4)] == [mx.gpu(i) for i in range(4)]


@pytest.mark.parametrize(
    ("visible", "gpus", "chosen"),
    [
        ("0", 1, [0, 0, 0, 0]),  # Slurm's --gpus-per-task=1, each task in a cgroup of its own
        ("0,1", 2, [0, 1, 0, 1]),  # --gpus-per-task=2
        ("MIG-0ba1c2d3-7e4f-5a6b-8c9d-0e1f2a3b4c5d", 1, [0, 0, 0, 0]),
        ("GPU-8f3c2a1b-1c2d-3e4f-5a6b-7c8d9e0f1a2b,GPU-1a", 2, [0, 1, 0, 1]),
        ("0,1,2,3", 4, [0, 1, 2, 3]),
    ],
)
def test_ranks_that_are_shown_gpus_of_their_own_take_these(
    usable, monkeypatch, visible, gpus, chosen
):
    monkeypatch.setattr(device, "local_size", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [device.choose("auto", rank, gpus) for rank in range(4)] == list(map(mx.gpu, chosen))


@pytest.mark.parametrize("gpus", [1, 2])
def test_more_ranks_than_gpus_are_refused(usable, monkeypatch, gpus):
    monkeypatch.setattr(device, "local_size", lambda: 3)
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as error:
        device.choose("auto", 0, gpus)
    said = f"3 ranks on this node, {gpus} GPUs; start at most one rank per GPU "
    assert line(error).startswith(
        said
    ) and f"`make train RANKS={gpus}`), or set device=cpu" in line(error)


PLACES = """
import os
import mxnet as mx
from trainer.dist import device
mx.nd.ones = lambda *_, **__: mx.nd.zeros(1)
device.choose("gpu", 0, 1)
places = [device.pci_address(c) for c in (mx.cpu(), mx.gpu(0), mx.gpu(1))]
print(*places, os.environ.get("MXNET_USE_FUSION"), sep=", ")
"""


@pytest.mark.parametrize(("version", "fusion"), [("11070", "0"), ("11080", "None")])
def test_what_is_asked_of_the_driver(tmp_path, version, fusion):
    """Here tests/gpu/libcuda.c, through the real call: PCI addresses, and whether it reads PTX."""
    library = tmp_path / "libcuda.so.1"
    source = ROOT / "tests" / "gpu" / "libcuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "CUDA_PLACES": "1Ab3"}
    env = {**env, "CUDA_DRIVER": version}
    done = subprocess.run(
        [sys.executable, "-c", PLACES], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.splitlines()[-1] == f", 0000:1A:00.0, 0000:b3:00.0, {fusion}"


@pytest.mark.parametrize("asked", ["auto", "gpu"])
def test_gpu_that_cannot_compute_is_named_with_the_way_out(asked):
    """The real error of an MXNet without CUDA stands for that of a GPU too new for it."""
    with pytest.raises(ConfigError) as error:
        device.choose(asked, 1, 2)
    text = line(error)
    assert "gpu(1)" in text and "NGC" in text and "compute capability" in text


BROKEN = """Traceback (most recent call last):
  File "../include/mxnet/base.h", line 458
CUDA: Check failed: e == cudaSuccess (803 vs. 0) : system has unsupported display driver"""


@pytest.mark.parametrize("asked", ["auto", "gpu", "cpu"])
def test_a_broken_driver_is_said_at_once(monkeypatch, asked):
    """In the words of a CUDA build on one. Its CPU ranks would die in their first backward."""

    def fail():
        raise mx.MXNetError(BROKEN)

    monkeypatch.setattr(mx.context, "num_gpus", fail)
    with pytest.raises(ConfigError) as error:
        device.choose(asked, 0)
    assert "driver does not work (system has unsupported display driver)" in line(error)


@pytest.mark.parametrize(("rank", "cuda", "said"), [(0, True, 1), (1, True, 0), (0, False, 0)])
def test_a_cuda_build_without_gpus_says_that_it_goes_on_on_the_cpu(
    monkeypatch, capsys, rank, cuda, said
):
    monkeypatch.setenv("HOROVOD_RANK", str(rank))
    monkeypatch.setattr(mx.runtime.Features, "is_enabled", lambda *_: cuda)
    assert device.choose("auto", 0, 0) == mx.cpu()
    assert capsys.readouterr().err.count("sees no GPU: training on the CPU") == said


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many cores, for a rank that its launcher has told its place."""
    bound = []

    def of(cores, local_rank, ranks, quota=None, **environment):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(device, "quota_cores", lambda: quota)
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, own: bound.append(own))
        for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND"):
            monkeypatch.setenv(name, "")  # so that what the code sets is taken back
            monkeypatch.delenv(name)
        place = {"HOROVOD_LOCAL_RANK": str(local_rank), "HOROVOD_LOCAL_SIZE": str(ranks)}
        for name, value in {**place, **environment}.items():
            monkeypatch.setenv(name, value)
        return bound

    return of


@pytest.mark.parametrize(
    "cores, quota, ranks, threads",
    [
        (8, None, 1, "8"),
        (8, None, 2, "4"),
        (8, None, 3, "2"),
        (2, None, 5, "1"),
        (64, 4, 1, "4"),  # docker run --cpus=4
        (64, 4, 2, "2"),
        (2, 4, 1, "2"),
    ],
)
def test_cores_are_shared_among_the_ranks_of_the_node(machine, cores, quota, ranks, threads):
    machine(cores, 0, ranks, quota)
    device.share_cores()
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_each_rank_keeps_to_cores_of_its_own(machine, monkeypatch):
    monkeypatch.setattr(device, "_physical_core", lambda cpu: (0, cpu))
    for local_rank in range(3):
        bound = machine(8, local_rank, 3)
        device.share_cores()
    assert bound == [{0, 1}, {2, 3}, {4, 5}]


def test_threads_of_a_physical_core_go_to_one_rank(machine, monkeypatch):
    monkeypatch.setattr(device, "_physical_core", lambda cpu: (0, cpu % 4))
    bound = machine(8, 0, 2)
    device.share_cores()
    assert bound == [{0, 4, 1, 5}]


@pytest.mark.parametrize(
    "environment", [{"OMP_PROC_BIND": "false"}, {"HOROVOD_LOCAL_SIZE": "1"}], ids=str
)
def test_a_rank_is_not_bound(machine, environment):
    bound = machine(8, 0, 2, **environment)
    device.share_cores()
    assert bound == []


def test_ranks_with_more_threads_than_cores_share_them():
    assert device.own_cores({0, 1}, 1, ranks=4, threads=1) == {0, 1}
    # As where Slurm has given each of four ranks four cores: these are this one's own.
    assert device.own_cores({4, 5, 6, 7}, 1, ranks=4, threads=4) == {4, 5, 6, 7}


def test_number_of_threads_that_the_user_set_stays(machine):
    machine(8, 0, 2, OMP_NUM_THREADS="7")
    device.share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "7"


RANK = {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("first", "environment", "shared"),
    [
        ("", RANK, True),
        ("import mxnet", RANK, False),  # its threads are settled
        ("", {}, False),  # ranks that a notebook starts later would inherit it
    ],
)
def test_a_script_that_takes_a_name_of_the_trainer_has_cores_of_its_own(first, environment, shared):
    code = f"{first}\nimport os, trainer\ntrainer.Config\nprint('OMP_NUM_THREADS' in os.environ)"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "HOROVOD_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(shared)


def test_ranks_that_compute_with_all_cores_each_are_told_of_once(machine, capfd):
    for local_rank in (0, 1):
        machine(8, local_rank, 2)
        device.tell_of_threads()
    said = capfd.readouterr().err
    assert said.count("each of 2 ranks computes with 8 threads") == 1
    assert "set OMP_NUM_THREADS=4" in said
    machine(8, 0, 2, OMP_NUM_THREADS="8")
    device.tell_of_threads()
    machine(8, 0, 1)
    device.tell_of_threads()
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("bound", "ranks", "quota", "own"),
    [(64, 1, None, 64), (64, 1, 4, 4), (64, 8, 4, 1), (2, 1, 4, 2)],
)
def test_cores_of_a_rank_are_no_more_than_its_share_of_a_quota(machine, bound, ranks, quota, own):
    machine(bound, 0, ranks, quota)
    assert device.cores() == own
