"""The individual checks of `launch doctor`. Each returns rows; a failed row says how to fix it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

from ..core.cpu_quota import quota_cores

OK, WARN, FAIL = "ok", "warn", "FAIL"
MIN_DRIVER = 450  # of CUDA 11 (NVIDIA's table of minor version compatibility)
MIN_FREE_BYTES = 2**30
NGC = "use NVIDIA's NGC MXNet container (24.06): python -m launch slurm --container ..."


@dataclass(frozen=True)
class Row:
    """One finding; `status` is ok, warn (training works, with a drawback) or FAIL (it cannot)."""

    name: str
    status: str
    found: str
    fix: str = ""


def run(command: List[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs a command; exit code 127 if the program does not exist, 124 if it hangs."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:g} s")


def ask_libraries() -> Dict[str, Any]:
    """The output of probe_libraries.py; if it crashes, both libraries count as broken."""
    done = run([sys.executable, "-m", "launch.doctor.probe_libraries"])
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        broken = {"error": _last_line(done)}
        return {"mxnet": broken, "horovod": broken, "missing": []}


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Of the errors of a program that failed."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def library_rows(libraries: Dict[str, Any]) -> List[Row]:
    """Python, MXNet, Horovod and TensorBoard, from the result of `ask_libraries`."""
    version = sys.version_info[:2]
    rows = [
        Row(
            "Python",
            OK if (3, 8) <= version <= (3, 11) else FAIL,
            "{}.{}".format(*version),
            "MXNet 1.9.1 needs Python 3.8 to 3.11: make setup PYTHON=python3.11",
        )
    ]
    mxnet, horovod = libraries["mxnet"], libraries["horovod"]
    if "error" in mxnet:
        rows.append(Row("MXNet", FAIL, mxnet["error"], "make setup"))
    else:
        cuda = "with CUDA" if "CUDA" in mxnet["features"] else "for the CPU"
        rows.append(Row("MXNet", OK, f"{mxnet['version']} {cuda}"))
    if "error" in horovod:
        rows.append(Row("Horovod", FAIL, horovod["error"], "make setup"))
    else:
        parts = [name for name in ("gloo", "mpi", "nccl") if horovod[name]]
        status = OK if horovod["gloo"] else FAIL
        found = f"{horovod['version']} with {', '.join(parts) or 'nothing'} built in"
        rows.append(Row("Horovod", status, found, "make setup builds it with HOROVOD_WITH_GLOO=1"))
    missing = libraries["missing"]
    rows.append(
        Row(
            "TensorBoard",
            WARN if missing else OK,
            f"no {', '.join(missing)}" if missing else "found",
            f"pip install {' '.join(missing)}",
        )
    )
    return rows


def gpu_rows(libraries: Dict[str, Any]) -> List[Row]:
    """The driver, whether MXNet computes on the GPUs, and NCCL."""
    query = "--query-gpu=name,compute_cap,driver_version"
    answer = run(["nvidia-smi", query, "--format=csv,noheader"], timeout=30)
    cuda_build = "CUDA" in libraries["mxnet"].get("features", ())
    if answer.returncode == 127:
        note = "; MXNet is a CUDA build without a GPU here" if cuda_build else ""
        return [Row("GPU", OK, f"none (no nvidia-smi): training runs on the CPU{note}")]
    if answer.returncode:
        found = (answer.stdout + answer.stderr).strip().splitlines()[-1:]
        fix = "the driver does not answer: nvidia-smi must work before MXNet can"
        return [Row("GPU", FAIL if cuda_build else WARN, "".join(found), fix)]
    gpus = [[word.strip() for word in line.split(",")] for line in answer.stdout.splitlines()]
    if not gpus:
        return [Row("GPU", OK, "none: training runs on the CPU")]
    driver = gpus[0][2]
    names = ", ".join(f"{name} (sm_{cap.replace('.', '')})" for name, cap, _ in gpus)
    good_driver = int(re.split(r"\D", driver)[0] or 0) >= MIN_DRIVER
    rows = [
        Row("driver", OK if good_driver else FAIL, driver, f"CUDA 11 needs {MIN_DRIVER} or later")
    ]
    if not cuda_build:
        fix = "make setup GPU=1 installs a CUDA build; without it training runs on the CPU"
        return [*rows, Row("GPU", WARN, f"{names}, but MXNet is built for the CPU", fix)]
    rows.append(_kernel_row(names, libraries.get("gpus", {})))
    if len(gpus) > 1:
        rows.append(_nccl_row(libraries["horovod"]))
    rows += _horovod_code_row({cap.replace(".", "") for _, cap, _ in gpus})
    return rows


def _kernel_row(names: str, tried: Dict[str, Any]) -> Row:
    """Whether each GPU that MXNet sees has computed something."""
    errors = tried.get("errors", [])
    for number, error in enumerate(errors):
        if error:
            return Row("GPU", FAIL, f"{names}: MXNet cannot compute on gpu({number}): {error}", NGC)
    if errors:
        count = len(errors)
        each = f"one rank on each: python -m launch local -n {count}"
        return Row("GPU", OK, f"{names}; MXNet computes on {count} of them; {each}")
    found = tried.get("error", "MXNet sees none of them" if tried else "MXNet crashed there")
    fix = "CUDA_VISIBLE_DEVICES must name them, and for GPUs from sm_90 on " + NGC
    return Row("GPU", FAIL, f"{names}: {found}", fix)


def _nccl_row(horovod: Dict[str, Any]) -> Row:
    version = horovod.get("nccl", 0)
    if version > 1:
        # NCCL_VERSION_CODE: 2708 for 2.7.8, 21003 for 2.10.3.
        major, minor = divmod(version // 100, 100 if version >= 10000 else 10)
        return Row("NCCL", OK, f"{major}.{minor}.{version % 100}")
    if version:
        return Row("NCCL", OK, "built in")
    fix = "gradients cross the host's memory: build Horovod with HOROVOD_GPU_OPERATIONS=NCCL"
    return Row("NCCL", WARN, "not built into Horovod", fix)


def _horovod_code_row(here: Set[str]) -> List[Row]:
    """Whether set-up has built Horovod's own kernels for the GPUs ``here`` (``80``), if known."""
    try:
        stamp = json.loads((Path(sys.prefix) / "installed.json").read_text(encoding="utf-8"))
        built = str(stamp["cuda_code"])
    except (OSError, ValueError, KeyError):
        return []
    # Machine code of 8.0 runs on 8.6 too, not that of 7.5 on 8.0, nor that of 8.6 on 8.0.
    runs = {
        cap for cap in here for code in built.split(",") if code[:-1] == cap[:-1] and code <= cap
    }
    missing = ", ".join(f"sm_{cap}" for cap in sorted(here - runs))
    fix = f"rm -r .venv, then HOROVOD_BUILD_CUDA_CC_LIST={','.join(sorted(here))} make setup GPU=1"
    found = f"Horovod's kernels are for sm_{', sm_'.join(built.split(','))}"
    if missing:
        return [Row("CUDA code", FAIL, f"{found}, not {missing}", fix)]
    return [Row("CUDA code", OK, found)]


def cores_row() -> Row:
    """The cores that ranks here divide, and what limits them."""
    bound, quota = len(os.sched_getaffinity(0)), quota_cores()
    allocated = int(os.environ.get("SLURM_CPUS_ON_NODE", bound))
    total = os.cpu_count() or bound
    limits = [f"bound to {bound} of {total}"] if bound < total else []
    limits += [f"the container's CPU quota is {quota}"] if quota else []
    limits += [f"the Slurm job has {allocated}"] if allocated < bound else []
    note = f" ({', '.join(limits)})" if limits else ""
    return Row("cores", OK, f"{min(bound, quota or bound, allocated)}{note}")


def data_row() -> Row:
    """Fashion-MNIST, found or downloaded as in training."""
    done = run([sys.executable, "-m", "trainer.data.fashion_mnist"])
    words = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    if done.returncode == 0:
        return Row("data", OK, f"Fashion-MNIST in {''.join(words)}")
    return Row("data", FAIL, "Fashion-MNIST cannot be had", "".join(words))


def write_row(folder: Path) -> Row:
    """Whether `folder` is writable, and its free space."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Row(
            "write", FAIL, f"{folder}: {error.strerror}", "start in a folder you may write to"
        )
    free = shutil.disk_usage(folder).free
    status = OK if free >= MIN_FREE_BYTES else WARN
    return Row("write", status, f"{folder}, {free / 2**30:.1f} GiB free", "checkpoints need room")


def slurm_row() -> Row:
    """Whether Slurm's commands are installed, and its partitions."""
    done = run(["sinfo", "--noheader", "--format=%R %D"], timeout=30)
    if done.returncode == 127:
        return Row("Slurm", OK, "not on this machine; `python -m launch local` does not need it")
    if done.returncode:
        fix = "its controller must answer before jobs can be submitted; `launch local` needs none"
        return Row("Slurm", WARN, _last_line(done), fix)
    partitions = [line.split() for line in done.stdout.splitlines()]
    return Row("Slurm", OK, ", ".join(f"{name} ({nodes} nodes)" for name, nodes in partitions))


def allreduce_row(done: subprocess.CompletedProcess[str]) -> Row:
    """The result of launch/doctor/probe_allreduce.py."""
    report = allreduce_report(done)
    if report is None:
        return Row(
            "allreduce",
            FAIL,
            _last_line(done),
            "python -m launch local -n 2 -- python -m launch.doctor.probe_allreduce shows all "
            "of it",
        )
    return Row(
        "allreduce",
        OK,
        f"{report['ranks']} ranks: {report['latency_ms']} ms, {report['mb_per_s']} MB/s at 45 MB",
    )


def allreduce_report(done: subprocess.CompletedProcess[str]) -> Optional[Dict[str, Any]]:
    """The probe's JSON; None if it failed."""
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return None


def host_row() -> Row:
    """The address to which this host's name resolves."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return Row("host", OK, f"{name} does not resolve; launch uses the route's address instead")
    note = (
        " (this host only); launch uses the route's address" if address.startswith("127.") else ""
    )
    return Row("host", OK, f"{name} is {address}{note}")
