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
from ..core.process import run
from ..core.ranks import count_of

OK, WARN, FAIL = "ok", "warn", "FAIL"
MIN_DRIVER = 450  # of CUDA 11 (NVIDIA's table of minor version compatibility)
FUSING_DRIVER = 520  # of CUDA 11.8, whose NVRTC makes the PTX
MIN_FREE_BYTES = 2**30
SLOW_MB_PER_S = 250  # 45 MB then take as long as the step of a small net
PROBE_SECONDS = 120.0
PROBE = [sys.executable, "-m", "launch.doctor.probe"]
NGC = "use NVIDIA's NGC MXNet container (24.06): python -m launch slurm --container ..."


@dataclass(frozen=True)
class Row:
    """One finding; `status` is ok, warn (training works, with a drawback) or FAIL (it cannot)."""

    name: str
    status: str
    found: str
    fix: str = ""


def ask_libraries() -> Dict[str, Any]:
    """What probe.py says of the libraries; if it crashes, both libraries count as broken."""
    done = run([*PROBE, "libraries"], timeout=PROBE_SECONDS)
    broken = {"error": _last_line(done)}
    return _report(done) or {"mxnet": broken, "horovod": broken, "missing": []}


def _report(done: subprocess.CompletedProcess[str]) -> Optional[Dict[str, Any]]:
    """The JSON in a probe's last line; None if it failed."""
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return None


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Of the errors of a program that failed."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def library_rows(libraries: Dict[str, Any]) -> List[Row]:
    """Python, MXNet, Horovod and TensorBoard, from the result of `ask_libraries`."""
    version = sys.version_info[:2]
    status = OK if (3, 8) <= version <= (3, 11) else FAIL
    fix = "MXNet 1.9.1 needs Python 3.8 to 3.11: make setup PYTHON=python3.11"
    rows = [Row("Python", status, "{}.{}".format(*version), fix)]
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
    found = f"no {', '.join(missing)}" if missing else "found"
    fix = f"pip install {' '.join(missing)}"
    return [*rows, Row("TensorBoard", WARN if missing else OK, found, fix)]


def gpu_rows(libraries: Dict[str, Any]) -> List[Row]:
    """The driver, whether MXNet computes on the GPUs, and NCCL."""
    answer = _nvidia_smi("name,driver_version,compute_cap")
    if "compute_cap" in answer.stdout + answer.stderr:  # which no driver before 510 knows
        answer = _nvidia_smi("name,driver_version")
    cuda_build = "CUDA" in libraries["mxnet"].get("features", ())
    if answer.returncode == 127:
        note = "; MXNet is a CUDA build without a GPU here" if cuda_build else ""
        return [Row("GPU", OK, f"none (no nvidia-smi): training runs on the CPU{note}")]
    if answer.returncode:
        found = (answer.stdout + answer.stderr).strip().splitlines()[-1:]
        fix = "the driver does not answer: nvidia-smi must work before MXNet can"
        return [Row("GPU", FAIL if cuda_build else WARN, "".join(found), fix)]
    lines = (line for line in answer.stdout.splitlines() if "," in line)  # No devices were found
    gpus = [[word.strip() for word in line.split(",")] for line in lines]
    if not gpus:
        return [Row("GPU", OK, "none: training runs on the CPU")]
    driver = gpus[0][1]
    caps = [cap.replace(".", "") for _, _, *known in gpus for cap in known]
    names = ", ".join(gpu[0] for gpu in gpus)
    if caps:
        names = ", ".join(f"{gpu[0]} (sm_{cap})" for gpu, cap in zip(gpus, caps))
    major = int(re.split(r"\D", driver)[0] or 0)
    status, fix = OK if major >= MIN_DRIVER else FAIL, f"CUDA 11 needs {MIN_DRIVER} or later"
    if status == OK and major < FUSING_DRIVER:
        status, fix = WARN, f"driver {FUSING_DRIVER} or later; else steps are slower"
        driver += ": cannot compile what MXNet fuses; the trainer sets MXNET_USE_FUSION=0"
    rows = [Row("driver", status, driver, fix)]
    if not cuda_build:
        fix = "make setup GPU=1 installs a CUDA build; without it training runs on the CPU"
        return [*rows, Row("GPU", WARN, f"{names}, but MXNet is built for the CPU", fix)]
    rows.append(_kernel_row(names, libraries.get("gpus", {})))
    if len(gpus) > 1:
        rows.append(_nccl_row(libraries["horovod"]))
    return [*rows, *(_horovod_code_row(set(caps)) if caps else [])]


def _nvidia_smi(fields: str) -> subprocess.CompletedProcess[str]:
    """Its answer: a line of these fields for each GPU."""
    return run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], timeout=30)


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
    allocated = count_of(os.environ, "SLURM_CPUS_ON_NODE", bound)
    total = os.cpu_count() or bound
    limits = [f"bound to {bound} of {total}"] if bound < total else []
    limits += [f"the container's CPU quota is {quota}"] if quota else []
    limits += [f"the Slurm job has {allocated}"] if allocated < bound else []
    note = f" ({', '.join(limits)})" if limits else ""
    return Row("cores", OK, f"{min(bound, quota or bound, allocated)}{note}")


def data_row() -> Row:
    """Fashion-MNIST, found or downloaded as in training."""
    done = run([sys.executable, "-m", "trainer.data.fashion_mnist"], timeout=PROBE_SECONDS)
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
        fix = "start in a folder you may write to"
        return Row("write", FAIL, f"{folder}: {error.strerror}", fix)
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


def allreduce_row(done: subprocess.CompletedProcess[str], between_nodes: bool = False) -> Row:
    """What probe.py has measured, and what to change where the link between nodes is slow."""
    report = _report(done)
    if report is None:
        fix = "python -m launch local -n 2 -- python -m launch.doctor.probe allreduce shows it all"
        return Row("allreduce", FAIL, _last_line(done), fix)
    found = "{ranks} ranks over {interface}: {latency_ms} ms, {mb_per_s} MB/s at 45 MB"
    fix = (
        "is there a faster network? HOROVOD_GLOO_IFACE=<its interface>; otherwise "
        "optimizer.fp16_allreduce=true sends half the bytes, a larger train.global_batch_size "
        "sends them less often; `srun ... python -m trainer bench` shows how much of the time "
        "training hides"
    )
    slow = between_nodes and report["mb_per_s"] < SLOW_MB_PER_S
    return Row("allreduce", WARN if slow else OK, found.format(**report), fix)


def host_row() -> Row:
    """The address to which this host's name resolves."""
    name, instead = socket.gethostname(), "launch uses the route's address"
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return Row("host", OK, f"{name} does not resolve; {instead} instead")
    note = f" (this host only); {instead}" if address.startswith("127.") else ""
    return Row("host", OK, f"{name} is {address}{note}")
