"""Ranks on three hosts: the network interface, late and lost hosts, cut links.

The hosts are network namespaces (tests/integration/hosts.py). Slurm's variables are set by hand, so
that `slurm-rank` runs there as it would on three nodes; test_slurm.py has the real Slurm.
"""

import re
import sys
import time
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest

from tests.waiting import wait_until
from trainer import checkpoint

from .commands import SMALL
from .hosts import Hosts, slurm_variables, why_not

STANDIN = Path(__file__).with_name("standin.py")
GLOO_TIMEOUT = 5

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def hosts(tmp_path):
    with Hosts(3, tmp_path) as hosts:
        yield hosts


def start(hosts, number, command, *options, **environment):
    """Starts the rank of host `number` (0, 1, 2)."""
    told = {**slurm_variables(number, 3), "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT)}
    rank = [sys.executable, "-m", "launch", "slurm-rank", *options, "--", *command]
    return hosts.start(hosts.names[number], rank, {**told, **environment})


def start_all(hosts, command, *options, **environment):
    return [start(hosts, number, command, *options, **environment) for number in range(3)]


def ends(processes, seconds=60):
    """(exit code, output) of each, which must end within `seconds` altogether."""
    deadline = time.monotonic() + seconds
    return [
        (process.returncode, out)
        for process in processes
        for out in [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]]
    ]


def standin(folder, steps, seconds=0.05):
    return ["python", str(STANDIN), str(folder), str(steps), str(seconds)]


def wait_for_steps(folder, count=1):
    """Waits until so many more steps are done than now."""

    def done():
        path = folder / "losses"
        return len(path.read_text().splitlines()) if path.exists() else 0

    goal = done() + count
    wait_until(lambda: done() >= goal, lambda: f"stands at step {done()}")


def test_three_hosts_train(hosts, tmp_path):
    command = ["python", "-m", "trainer", "train", *SMALL, "train.epochs=1", f"output={tmp_path}"]
    results = ends(start_all(hosts, command, OMP_NUM_THREADS="1"), seconds=120)
    assert [code for code, _ in results] == [0, 0, 0], results
    assert "(500 images)" in results[0][1]
    assert [out for _, out in results[1:]] == ["", ""]


def trained_with_group_norm(hosts, output, ranks_of_hosts):
    """The merged model after four steps of four samples, and each rank's running statistics."""
    tasks = ",".join(map(str, ranks_of_hosts))
    shape = {
        "SLURM_STEP_NUM_TASKS": str(sum(ranks_of_hosts)),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NODELIST": "h[1-2]",
        "OMP_NUM_THREADS": "1",
    }
    command = ["python", "-m", "trainer", "train", *SMALL, "batch_norm=group"]
    command += ["model.factory=tests.integration.nets:smooth", "train.global_batch_size=4"]
    command += ["train.max_steps=4", f"output={output}"]
    places = [(host, local) for host in (0, 1) for local in range(ranks_of_hosts[host])]
    ranks = [
        start(hosts, host, command, **shape, SLURM_PROCID=str(rank), SLURM_LOCALID=str(local))
        for rank, (host, local) in enumerate(places)
    ]
    results = ends(ranks, seconds=120)
    assert [code for code, _ in results] == [0] * len(ranks), results
    path = output / "default" / "checkpoints" / "step-00000004"
    weights = mx.nd.load(str(path / checkpoint.PARAMETERS))
    own = mx.nd.load(str(path / checkpoint.OPTIMIZER))["statistics"]
    return {name: array.asnumpy() for name, array in weights.items()}, own.asnumpy()


def test_batch_norm_over_the_ranks_of_each_of_two_hosts(hosts, tmp_path):
    """Two samples a host, whether a rank has both or two ranks share them: nothing else changes."""
    weights, own = trained_with_group_norm(hosts, tmp_path / "four", (2, 2))
    expected, expected_own = trained_with_group_norm(hosts, tmp_path / "three", (2, 1))
    first, second = own[0], own[2]
    assert (own == [first, first, second, second]).all()
    assert not np.allclose(first, second, rtol=0.01)
    np.testing.assert_allclose(own[:3], expected_own, rtol=1e-4, atol=1e-5)
    alone, own_alone = trained_with_group_norm(hosts, tmp_path / "two", (1, 1))
    np.testing.assert_allclose(own_alone, [first, second], rtol=1e-4, atol=1e-5)
    for name, array in expected.items():
        for found in (weights, alone):
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_doctor_tells_what_a_slow_link_gives_and_what_to_change(hosts):
    hosts.throttle("400mbit")
    doctor = [sys.executable, "-m", "launch", "doctor"]
    (_, said), *_ = ends(
        [hosts.start(name, doctor, slurm_variables(n, 3)) for n, name in enumerate(hosts.names)],
        seconds=300,
    )
    found = re.search(r"^warn +allreduce +3 ranks over eth0: [\d.]+ ms, ([\d.]+) MB/s", said, re.M)
    assert found and float(found[1]) < 50, said  # 400 Mbit/s
    assert "fix: is there a faster network? HOROVOD_GLOO_IFACE=" in said


def test_bench_tells_what_a_slow_link_gives_and_what_to_change(hosts):
    """The seed's net sends 45 MB a step: 0.9 s at 400 Mbit/s, which nothing can hide."""
    hosts.throttle("400mbit")
    bench = ["python", "-m", "trainer", "bench", *SMALL, "model.factory=trainer.model:resnet18"]
    bench += ["--steps", "3", "--warmup", "1"]
    (code, said), *others = ends(start_all(hosts, bench, OMP_NUM_THREADS="1"), seconds=200)
    assert (code, *(other for other, _ in others)) == (0, 0, 0), said
    found = re.search(r"^gradients, alone +[\d,.]+ +44.7 MB, (\d+) MB/s$", said, re.M)
    assert found and int(found[1]) < 50, said
    hidden = re.search(r"^gradients, in training +[\d,.]+ +(\d+) % are hidden", said, re.M)
    assert hidden and int(hidden[1]) < 90, said
    assert "of a step waits for gradients: a larger train.global_batch_size" in said
    assert "optimizer.fp16_allreduce=true sends half as many bytes" in said


def test_late_host_is_waited_for_and_each_offers_the_address_others_reach(hosts, tmp_path):
    """Later than Gloo's own time-out; 127.0.1.1, which the hosts' names mean, would not do."""
    show = ["sh", "-c", f"echo $HOROVOD_GLOO_IFACE; exec {' '.join(standin(tmp_path, 3))}"]
    short = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "3"}
    early = [start(hosts, number, show, **short) for number in (0, 1)]
    time.sleep(5)
    results = ends([*early, start(hosts, 2, show, **short)])
    assert results == [(0, "eth0\nfrom step 0 with 3 ranks\ndone: 36.0\n"), *[(0, "eth0\n")] * 2]


def test_local_ranks_where_the_hosts_own_name_does_not_resolve(hosts, tmp_path):
    """Horovod alone would end in a segmentation fault."""
    local = [sys.executable, "-m", "launch", "local", "-n", "2", "--quiet", "--"]
    rename = ["sh", "-c", 'hostname nonesuch; exec "$@"', "sh"]
    (result,) = ends([hosts.start("h1", [*rename, *local, *standin(tmp_path, 3, 0)], {})])
    assert result == (0, "from step 0 with 2 ranks\ndone: 18.0\n")


def test_host_that_never_comes_is_named(hosts):
    options = ["--start-timeout", "3"]
    results = ends([start(hosts, number, ["true"], *options) for number in (0, 1)])
    assert [code for code, _ in results] == [1, 1]
    for _, out in results:
        assert "2 of 3 ranks checked in within 3 s; missing: rank 2" in out


def test_lost_first_host_is_named_by_the_others(hosts):
    """Without task 0 there is no store; its address is what the others can tell."""
    options = ["--start-timeout", "2"]
    results = ends([start(hosts, number, ["true"], *options) for number in (1, 2)])
    for number, (code, out) in enumerate(results, 2):
        assert code == 1
        assert re.fullmatch(
            rf"launch: rank {number - 1} \(h{number}\): found no store of rank 0 at 10\.77\.0\.1, "
            r"ports \d+-\d+ \(16 of them\); if srun has not started this process, .*\n",
            out,
        )


def test_a_wrong_interface_is_reported_by_the_store_and_ends_all_ranks(hosts, tmp_path):
    """Two ranks end at once. Gloo leaves the third waiting: the trainer's watchdog ends it."""
    command = ["python", "-m", "trainer", "train", *SMALL, f"output={tmp_path}"]
    processes = start_all(
        hosts, [*command, "train.watchdog_seconds=12"], HOROVOD_GLOO_IFACE="spare"
    )
    results = ends(processes)
    assert all(code for code, _ in results)
    assert ["Network is unreachable" in out for _, out in results] == [False, True, True]
    said = results[0][1]
    assert "launch: 3 of 3 ranks have not connected to all others within 10 s" in said
    assert "over the interfaces: h1 spare 10.78.1.1; h2 spare 10.78.2.1; h3 spare 10.7" in said
    assert "rank 0 on h1 stood still for" in said
    assert "at the rendezvous of all ranks (train.watchdog_seconds is 12)" in said


@pytest.mark.parametrize("interface", ["lo", "docker0"])
def test_an_interface_with_one_address_on_all_hosts_is_refused(hosts, interface):
    """Gloo's ranks would look for each other on their own hosts, some of them for long."""
    for name in hosts.names:
        hosts.add_interface(name, "docker0", "172.17.0.1/16", bridge="docker")
    address = {"lo": "127.0.0.1", "docker0": "172.17.0.1"}[interface]
    for code, said in ends(start_all(hosts, ["true"], HOROVOD_GLOO_IFACE=interface)):
        assert code == 1
        assert re.fullmatch(
            r"launch: rank \d \(h\d\): h\d and h\d both have "
            rf"the address {address} on {interface}, so ranks would not "
            r"find each other: HOROVOD_GLOO_IFACE must name an interface .*\n",
            said,
        )


def test_hosts_on_two_networks_whose_names_lead_to_either(hosts, tmp_path):
    """As names with two addresses do by turns; the store is on one of the two networks."""
    for number, name in enumerate(hosts.names, 1):
        hosts.add_interface(name, "ib0", f"10.79.0.{number}/24", bridge="fabric")
        others = [n for n in (1, 2, 3) if n != number]
        networks = ("10.79.0", "10.77.0") if number == 1 else ("10.77.0", "10.79.0")
        hosts.know(name, [f"{network}.{n} h{n}" for network in networks for n in others])
    results = ends(start_all(hosts, standin(tmp_path, 3), "--start-timeout", "20"))
    assert results == [(0, "from step 0 with 3 ranks\ndone: 36.0\n"), (0, ""), (0, "")]


def test_rank_0_may_be_on_any_host_by_its_name_that_leads_to_itself_there(hosts, tmp_path):
    """As the line says that ranks get without it (tests/unit/launch/slurm/test_rank.py)."""
    where = {"LAUNCH_RENDEZVOUS_HOST": "h2"}
    ranks = [
        start(
            hosts, host, standin(tmp_path, 3), "--start-timeout", "20", **where, SLURM_PROCID=rank
        )
        for host, rank in enumerate("102")
    ]
    assert [code for code, _ in ends(ranks)] == [0, 0, 0]


def test_short_cut_is_survived_and_a_long_one_ends_all_ranks(hosts, tmp_path):
    processes = start_all(hosts, standin(tmp_path, 10_000))
    wait_for_steps(tmp_path)
    hosts.cut("h3")
    time.sleep(1.5)
    hosts.mend("h3")
    wait_for_steps(tmp_path, 5)
    hosts.cut("h3")
    results = ends(processes, seconds=GLOO_TIMEOUT + 30)
    assert all(code for code, _ in results)
    assert all("Horovod" in out for _, out in results), "each says that it lost a peer"


def test_killed_host_ends_the_others(hosts, tmp_path):
    """The host goes without a word: its cable is out before its processes end."""
    processes = start_all(hosts, standin(tmp_path, 10_000))
    wait_for_steps(tmp_path)
    hosts.cut("h2")
    hosts.kill("h2")
    results = ends([processes[0], processes[2]], seconds=GLOO_TIMEOUT + 30)
    assert all(code for code, _ in results)
