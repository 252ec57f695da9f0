"""The doctor's rows, with faked answers of nvidia-smi, Slurm and the libraries.

There is no GPU here: the GPU rows are tested on what a driver and MXNet would say.
"""

import json
import os
import subprocess

import pytest

from launch.doctor import checks, doctor, probe
from launch.doctor.checks import FAIL, OK, WARN, Row

HEALTHY = {
    "mxnet": {"version": "1.9.1", "features": ["CUDA", "CUDNN"]},
    "horovod": {"version": "0.28.1", "gloo": True, "mpi": False, "nccl": 21003},
    "missing": [],
    "gpus": {"errors": ["", ""]},
}
CPU = {**HEALTHY, "mxnet": {"version": "1.9.1", "features": ["MKLDNN"]}}


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on PATH that gives the answer it is set to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def set_answer(text, code=0):
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(0o755)

    return set_answer


def rows_with(**changes):
    return {row.name: row for row in checks.gpu_rows({**HEALTHY, **changes})}


@pytest.mark.parametrize(
    ("bound", "quota", "allocated", "found"),
    [
        (8, None, None, "8"),
        (2, None, 2, "2 (bound to 2 of 8)"),
        (8, 4, None, "4 (the container's CPU quota is 4)"),
        (8, 4, 3, "3 (the container's CPU quota is 4, the Slurm job has 3)"),
    ],
)
def test_cores_and_what_limits_them(monkeypatch, bound, quota, allocated, found):
    if allocated:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(allocated))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)))
    monkeypatch.setattr(checks, "quota_cores", lambda: quota)
    assert checks.cores_row() == Row("cores", OK, found)


NO_IMAGE = "CUDA: no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("gpus", "found"),
    [
        ({"errors": [NO_IMAGE]}, f"MXNet cannot compute on gpu(0): {NO_IMAGE}"),
        ({"errors": []}, "MXNet sees none of them"),
        ({"error": "MXNetError: CUDA driver version"}, "MXNetError: CUDA driver version"),
        ({}, "MXNet crashed there"),
    ],
)
def test_a_gpu_on_which_mxnet_cannot_compute_is_red(nvidia_smi, gpus, found):
    nvidia_smi("NVIDIA H100 80GB HBM3, 535.104.05, 9.0")
    row = rows_with(gpus=gpus)["GPU"]
    assert (row.status, row.found) == (FAIL, f"NVIDIA H100 80GB HBM3 (sm_90): {found}")
    assert "NGC" in row.fix


def test_gpus_that_this_build_can_use(nvidia_smi):
    nvidia_smi("Tesla V100-SXM2-32GB, 520.61.05, 7.0\nNVIDIA A10, 520.61.05, 8.6")
    rows = rows_with()
    assert [row.status for row in rows.values()] == [OK] * 3
    assert rows["GPU"].found == (
        "Tesla V100-SXM2-32GB (sm_70), NVIDIA A10 (sm_86); MXNet computes on 2 of them; "
        "one rank on each: python -m launch local -n 2"
    )
    assert rows["NCCL"].found == "2.10.3"
    assert rows["driver"].found == "520.61.05"


def test_one_unusable_gpu_among_usable_ones_is_found(nvidia_smi):
    nvidia_smi("NVIDIA A10, 535.1, 8.6\nNVIDIA H100, 535.1, 9.0")
    assert rows_with(gpus={"errors": ["", NO_IMAGE]})["GPU"].status == FAIL


def test_old_driver(nvidia_smi):
    nvidia_smi("Tesla V100, 418.87.01, 7.0")
    row = rows_with()["driver"]
    assert (row.status, row.fix) == (FAIL, "CUDA 11 needs 450 or later")


def test_a_driver_that_cannot_compile_what_mxnet_fuses(nvidia_smi):
    nvidia_smi("Tesla V100, 515.105.01, 7.0")
    row = rows_with()["driver"]
    assert (row.status, row.found.split(":")[0]) == (WARN, "515.105.01")
    assert "MXNET_USE_FUSION=0" in row.found
    assert row.fix.startswith("driver 520 or later")


@pytest.mark.parametrize(("nccl", "status"), [(0, WARN), (1, OK), (2708, OK)])
def test_nccl(nvidia_smi, nccl, status):
    nvidia_smi("NVIDIA A10, 535.1, 8.6\nNVIDIA A10, 535.1, 8.6")
    row = rows_with(horovod={**HEALTHY["horovod"], "nccl": nccl})["NCCL"]
    assert row.status == status
    if nccl == 2708:
        assert row.found == "2.7.8"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("70,86", FAIL, "Horovod's kernels are for sm_70, sm_86, not sm_80"),
        ("70,75,80", OK, "Horovod's kernels are for sm_70, sm_75, sm_80"),
        (None, None, None),  # built by other hands
    ],
)
def test_the_gpus_that_horovod_was_built_for(nvidia_smi, tmp_path, monkeypatch, code, status, said):
    nvidia_smi("Tesla T4, 535.1, 7.5\nNVIDIA A100, 535.1, 8.0")
    monkeypatch.setattr(checks.sys, "prefix", str(tmp_path))
    if code:
        (tmp_path / "installed.json").write_text(json.dumps({"cuda_code": code}))
    row = rows_with().get("CUDA code")
    assert (row and row.status, row and row.found) == (status, said)
    if status == FAIL:
        assert "HOROVOD_BUILD_CUDA_CC_LIST=75,80 make setup GPU=1" in row.fix


def test_gpu_with_a_cpu_build(nvidia_smi):
    nvidia_smi("NVIDIA A10, 535.1, 8.6")
    row = checks.gpu_rows(CPU)[-1]
    assert row.status == WARN
    assert row.fix.startswith("make setup GPU=1")


def test_a_driver_that_knows_no_compute_capability(nvidia_smi, tmp_path):
    """As 470 and 450 answer, with exit code 2."""
    nvidia_smi("Tesla V100, 470.82.01\nTesla V100, 470.82.01")
    program = tmp_path / "bin" / "nvidia-smi"
    said = 'Field \\"compute_cap\\" is not a valid field to query.'
    refusal = f'case "$1" in *compute_cap*) echo "{said}"; exit 2;; esac'
    program.write_text(program.read_text().replace("\n", f"\n{refusal}\n", 1))
    rows = rows_with()
    assert [row.status for row in rows.values()] == [WARN, OK, OK]
    assert rows["GPU"].found.startswith("Tesla V100, Tesla V100; MXNet computes on 2 of them")


def test_broken_driver(nvidia_smi):
    nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the driver", code=9)
    assert rows_with()["GPU"].status == FAIL
    assert checks.gpu_rows(CPU)[0].status == WARN


def test_no_gpu_is_no_fault(nvidia_smi, monkeypatch):
    nvidia_smi("No devices were found")
    (row,) = checks.gpu_rows(CPU)
    assert (row.status, row.found) == (OK, "none: training runs on the CPU")
    monkeypatch.setenv("PATH", "/nonexistent")
    (row,) = checks.gpu_rows(CPU)
    assert (row.status, row.found) == (OK, "none (no nvidia-smi): training runs on the CPU")


def by_name(rows):
    return {row.name: row for row in rows}


def test_library_rows():
    rows = by_name(checks.library_rows(HEALTHY))
    assert {row.status for row in rows.values()} == {OK}
    assert rows["MXNet"].found == "1.9.1 with CUDA"
    assert rows["Horovod"].found == "0.28.1 with gloo, nccl built in"


def test_broken_libraries_are_red_with_their_fix():
    broken = {
        "mxnet": {"error": "OSError: libcuda.so.1: cannot open shared object file"},
        "horovod": {**HEALTHY["horovod"], "gloo": False},
        "missing": ["tensorboard"],
    }
    rows = by_name(checks.library_rows(broken))
    assert rows["MXNet"] == Row("MXNet", FAIL, broken["mxnet"]["error"], "make setup")
    assert rows["Horovod"].status == FAIL
    assert "HOROVOD_WITH_GLOO=1" in rows["Horovod"].fix
    assert (rows["TensorBoard"].status, rows["TensorBoard"].fix) == (
        WARN,
        "pip install tensorboard",
    )


@pytest.mark.parametrize(("version", "status"), [((3, 7), FAIL), ((3, 11), OK), ((3, 12), FAIL)])
def test_python_version(monkeypatch, version, status):
    monkeypatch.setattr("sys.version_info", (*version, 0))
    assert by_name(checks.library_rows(HEALTHY))["Python"].status == status


def test_a_probe_that_crashes_is_reported(monkeypatch):
    crash = subprocess.CompletedProcess([], -11, "", "Illegal instruction\n")
    monkeypatch.setattr(checks, "run", lambda command, timeout: crash)
    libraries = checks.ask_libraries()
    assert libraries["mxnet"] == libraries["horovod"] == {"error": "Illegal instruction"}


def test_nothing_is_claimed_of_gpus_where_mxnet_is_built_for_the_cpu():
    assert "gpus" not in checks.ask_libraries()


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_kernel_is_tried_on_each_gpu(monkeypatch, gpus):
    """Of which this MXNet has none, and says so of each."""
    monkeypatch.setattr("mxnet.context.num_gpus", lambda: gpus)
    errors = probe._gpus()
    assert len(errors) == gpus
    assert all("GPU" in error or "CUDA" in error for error in errors), errors


def test_programs_that_are_missing_or_hang():
    assert checks.run(["/nonexistent/program"]).returncode == 127
    hanging = checks.run(["sleep", "60"], timeout=0.1)
    assert (hanging.returncode, hanging.stderr) == (124, "no answer within 0.1 s")


def test_write_access(tmp_path):
    assert checks.write_row(tmp_path).status in (OK, WARN)  # WARN: nearly full
    row = checks.write_row(tmp_path / "missing")
    assert (row.status, row.fix) == (FAIL, "start in a folder you may write to")


def test_data_that_cannot_be_had_is_red_with_the_ways_out(monkeypatch):
    answer = subprocess.CompletedProcess([], 1, "Fashion-MNIST is not on this machine ...\n", "")
    monkeypatch.setattr(checks, "run", lambda command, timeout: answer)
    row = checks.data_row()
    assert (row.status, row.fix) == (FAIL, "Fashion-MNIST is not on this machine ...")


def test_slurm_rows(monkeypatch):
    def answers(code, out, err=""):
        done = subprocess.CompletedProcess([], code, out, err)
        monkeypatch.setattr(checks, "run", lambda command, timeout: done)
        return checks.slurm_row()

    assert answers(0, "low 2\nhigh 2\n").found == "low (2 nodes), high (2 nodes)"
    assert answers(127, "").status == OK
    assert answers(1, "", "slurm_load_partitions: Unable to contact controller\n").status == WARN


def test_allreduce_row():
    measured = {"ranks": 2, "interface": "eth0", "latency_ms": 0.5, "mb_per_s": 900.0}

    def row(between_nodes, **measured):
        said = f"noise\n{json.dumps(measured)}\n"
        return checks.allreduce_row(subprocess.CompletedProcess([], 0, said, ""), between_nodes)

    assert row(True, **measured).found == "2 ranks over eth0: 0.5 ms, 900.0 MB/s at 45 MB"
    assert row(True, **measured).status == OK
    slow = row(True, **{**measured, "mb_per_s": 118.0})
    assert slow.status == WARN and "HOROVOD_GLOO_IFACE" in slow.fix
    assert row(False, **{**measured, "mb_per_s": 118.0}).status == OK  # no link, but slow cores
    bad = subprocess.CompletedProcess([], 1, "", "a\nConnection refused\n")
    assert checks.allreduce_row(bad).status == FAIL
    assert checks.allreduce_row(bad).found == "Connection refused"


def test_page_and_exit_code():
    rows = [
        Row("a", OK, "x", "unused"),
        Row("bb", WARN, "y", "mend y"),
        Row("c", FAIL, "z", "mend z"),
    ]
    assert doctor.page(rows) == (
        "ok    a   x\n"
        "warn  bb  y\n"
        "          fix: mend y\n"
        "FAIL  c   z\n"
        "          fix: mend z\n"
        "training cannot work: c"
    )
    assert doctor._report(rows) == 1
    assert doctor._report(rows[:2]) == 0
    assert doctor.page(rows[:2]).endswith("training can work here")


def node(host, clock=100.0, shared=True, *rows):
    rows = [vars(row) for row in rows or [Row("Python", OK, "3.11")]]
    return {"host": host, "rows": rows, "clock": clock, "shared": shared}


def test_a_row_for_each_node():
    found = (Row("Python", OK, "3.11"), Row("cores", OK, "2"), Row("write", OK, "/, 9 GiB free"))
    nodes = [node("n1", 100.0, True, *found), node("n2", 100.25, True, *found)]
    assert doctor.allocation_rows(nodes, 2) == [
        Row("n1", OK, "Python 3.11; cores 2; clock +0.00 s"),
        Row("n2", OK, "Python 3.11; cores 2; clock +0.25 s"),
    ]


def test_faults_between_nodes():
    broken = Row("MXNet", FAIL, "ImportError", "make setup")
    rows = doctor.allocation_rows(
        [node("n1"), node("n2", 130.0), node("n3", 100.0, False), node("n4", 100.0, True, broken)],
        5,
    )
    assert [row.status for row in rows] == [OK, WARN, WARN, FAIL, FAIL]
    assert "clock: +30.0 s off" in rows[1].found
    assert "is not the first node's" in rows[2].found
    assert (rows[3].found, rows[3].fix) == ("MXNet: ImportError", "make setup")
    assert rows[4].found == "4 of 5 nodes answered"


def test_a_folder_that_cannot_be_written_is_not_reported_as_not_shared(tmp_path):
    row = Row("write", FAIL, "/data: Read-only file system", "start elsewhere")
    rows = doctor.allocation_rows([node(n, 100.0, False, row) for n in ("n1", "n2")], 2)
    assert [row.found for row in rows] == ["write: /data: Read-only file system"] * 2
