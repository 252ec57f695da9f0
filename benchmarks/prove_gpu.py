"""Builds the GPU stack from nothing in a minimal Debian without a GPU, and runs what can run there.

    make prove-gpu        or, the same,        python -m benchmarks.prove_gpu [--keep FOLDER]

Needs root and debootstrap; downloads about 4 GB (Debian's CUDA 11.8 toolkit, for its nvcc, and the
wheels of requirements-gpu.txt) into 15 GB of disk. In a chroot of Debian 12's essential packages
it types what a user of a GPU node would: `make setup GPU=1`. Then, on ranks on the CPU:

- what Horovod says it was built with, and from where libmxnet's libraries come;
- the same training as the CPU build of this machine, digit for digit; tests/gpu; the doctor;
- what set-up, the doctor and the trainer say on a node whose driver fails, or with too few GPUs:
  tests/gpu/libcuda.c stands in for such a driver.

No kernel runs on a GPU and NCCL sends nothing: neither is shown. Writes results/prove_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from benchmarks import report
from benchmarks.minimal_debian import APART, INSIDE, ROOT, Chroot, mirror

PROJECT = "/opt/trainer"
TOOLKIT = "nvidia-cuda-toolkit"
STUB = "/opt/driver"
TRAIN = (
    "-m trainer train configs/quickstart.yaml data.dataset=fashion_mnist_sample"
    " train.epochs=4 optimizer.lr=0.02 output=/tmp/runs name={name} device={device}"
)
ALONE = ".venv/bin/python " + TRAIN
TWO = ".venv/bin/python -m launch local -n 2 --quiet -- .venv/bin/python " + TRAIN
WEIGHTS = (
    ".venv/bin/python -c 'import json, pathlib, sys; "
    'print(json.loads(max(pathlib.Path("/tmp/runs", sys.argv[1]).rglob("state.json"))'
    '.read_text())["weights"])\' {name}'
)
DRIVERS = {  # the error that each call of the driver gives, and its name in CUDA's table
    100: "CUDA_ERROR_NO_DEVICE",
    34: "CUDA_ERROR_STUB_LIBRARY",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    999: "CUDA_ERROR_UNKNOWN",
}


class Prover(Chroot):
    """A chroot in which commands may fail: that is what some of them are about."""

    def see(self, command: str, code: int, said: str, **environment: str) -> Dict[str, Any]:
        """Run a command; exits unless it ends with ``code`` and prints ``said`` (a pattern)."""
        words = [f"{name}={value}" for name, value in {**self.environment, **environment}.items()]
        inside = ["env", "-i", *words, "sh", "-c", f"cd {self.folder} && {command}"]
        done = subprocess.run(
            [*APART, "sh", "-c", INSIDE, str(self.root), *inside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = done.stdout.strip().splitlines()
        shown = " ".join([*(f"{name}={value}" for name, value in environment.items()), command])
        print(f"$ {shown}\n{done.stdout}", flush=True)
        if done.returncode != code or not re.search(said, done.stdout):
            sys.exit(f"{shown}: exit code {done.returncode}, wanted {code} and {said!r}")
        return {"command": shown, "exit code": code, "last lines": lines[-report.KEPT_LINES :]}


def main() -> None:
    """Build, run, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder for the Debian, which is left there")
    options = parser.parse_args()
    if os.geteuid() or not shutil.which("debootstrap"):
        sys.exit("this needs root and debootstrap: `apt-get install debootstrap`")
    before = report.machine()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        root = (options.keep or Path(temporary, "debian")).resolve()
        root.mkdir(parents=True)
        debian = Prover(root)
        figures = {"building": build(debian)}
        figures.update(prove(debian))
    print(report.write("prove_gpu", figures, before))


def build(debian: Prover) -> List[Dict[str, Any]]:
    """From nothing to a set-up project; what each missing piece is called before it is there."""
    seen = [debian.debootstrap("bookworm")]
    sources = f"deb {mirror()} bookworm main contrib non-free\n"
    (debian.root / "etc/apt/sources.list").write_text(sources)
    debian.environment["DEBIAN_FRONTEND"] = "noninteractive"
    install = "apt-get install --yes --no-install-recommends"
    seen.append(debian.run("apt-get update"))
    seen.append(debian.run(f"{install} g++ gcc make python3-venv dataset-fashion-mnist"))
    debian.copy_project(PROJECT)
    debian.folder = PROJECT
    setup = "make setup GPU=1"
    seen.append(debian.see(setup, 2, "is version 12, nvcc 11 needs 11 or older"))
    seen.append(debian.run(f"{install} g++-11"))
    seen.append(debian.see(setup, 2, "set-up stopped: no nvcc on PATH"))
    seen.append(debian.run(f"{install} {TOOLKIT}"))
    hidden = f"mv /etc/alternatives/nvidia--libcuda.so.1-* /tmp; {setup}; code=$?"
    seen.append(
        debian.see(
            f"{hidden}; mv /tmp/nvidia--libcuda* /etc/alternatives; exit $code",
            2,
            "set-up stopped: no NVIDIA driver: libmxnet needs its libcuda.so.1",
        )
    )
    seen.append(debian.run(setup))
    seen.append(debian.run("nvcc --version"))
    seen.append(debian.run(".venv/bin/python launch/install.py --gpu --dev"))
    # The toolkit is needed no more: what runs from here on finds CUDA in the wheels alone.
    seen.append(debian.run(f"apt-get purge --yes --auto-remove {TOOLKIT} nvidia-cuda-dev"))
    return seen


def prove(debian: Prover) -> Dict[str, Any]:
    """Everything that can run without a GPU, with the stand-in for its driver."""
    python, library = ".venv/bin/python", ".venv/lib/python3.*/site-packages/mxnet/libmxnet.so"
    debian.run(
        f"mkdir -p {STUB} && gcc-11 -shared -fPIC -Wl,-soname,libcuda.so.1"
        f" -o {STUB}/libcuda.so.1 tests/gpu/libcuda.c -ldl"
    )
    seen = [debian.see(f"{python} -c 'import mxnet'", 1, "libcuda.so.1: cannot open")]
    debian.environment["LD_LIBRARY_PATH"] = STUB  # the driver alone: a node has it in its path
    linked = debian.see(f"ldd {library}", 0, "libcudnn.so.8 => /opt/trainer/.venv")
    foreign = [
        line.strip()
        for line in linked["last lines"]
        if re.match(r"\s*lib(cu|nccl|nv)\S+ => ", line) and "=> /opt/" not in line
    ]
    if foreign:
        sys.exit(f"from elsewhere than the wheels: {foreign}")
    seen.append(linked)
    check = "--check-build"
    seen.append(debian.see(f".venv/bin/horovodrun {check}", 0, r"(?s)\[X\] MXNet.*\[X\] NCCL"))
    built = f"{python} -c 'import horovod.mxnet as h; print(h.nccl_built(), h.gloo_built())'"
    seen.append(debian.see(built, 0, "22105 True"))
    seen.append(debian.see(f"{python} -m pytest -q tests/gpu", 0, "passed"))
    ranks = f"{python} -m launch local -n 2 --quiet -- {python} -m tests.gpu.cpu_ranks"
    seen.append(debian.see(ranks, 0, "in shared memory .* cycle: 100 ms"))
    seen.append(debian.see(f"{python} -m launch doctor", 0, "MXNet is a CUDA build without a GPU"))
    return {"without a GPU": seen, "digits": digits(debian), "failure paths": failures(debian)}


def digits(debian: Prover) -> Dict[str, Any]:
    """Two CPU ranks of the GPU build end with the weights of this machine's CPU build."""
    name = "digits"
    there = debian.see(TWO.format(name=name, device="auto"), 0, "training on the CPU")
    there["weights"] = debian.see(WEIGHTS.format(name=name), 0, "^[0-9a-f]{32}$")["last lines"][-1]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        command = TWO.format(name=name, device="cpu").replace("/tmp/runs", folder)
        command = command.replace(".venv/bin/python", sys.executable)
        report.run("the CPU build", ["sh", "-c", command], ROOT)
        state = json.loads(max(Path(folder).rglob("state.json")).read_text())
    if state["weights"] != there["weights"]:
        sys.exit(f"weights {there['weights']}, the CPU build's are {state['weights']}")
    return {"GPU build": there, "weights of the CPU build": state["weights"]}


def failures(debian: Prover) -> List[Dict[str, Any]]:
    """What is said where a GPU node has something wrong with it."""
    broken = r"NVIDIA's driver does not work \("
    seen = []
    for error, name in DRIVERS.items():
        for device in ("auto", "cpu", "gpu"):
            command = ALONE.format(name=f"{error}-{device}", device=device)
            code, said = (0, "") if error == 100 else (2, broken)
            if error == 100 and device == "gpu":
                code, said = 2, "device is gpu; MXNet sees none"
            elif error == 100 and device == "auto":
                said = "MXNet is a CUDA build and sees no GPU: training on the CPU"
            seen.append(debian.see(command, code, said, CUDA_ERROR=str(error)))
            seen[-1]["driver"] = name
    preload = {"LD_PRELOAD": f"{STUB}/libcuda.so.1"}
    for gpus in ("1", "2"):
        command = TWO.replace("-n 2", f"-n {int(gpus) + 1}").format(name="few", device="auto")
        said = f"{int(gpus) + 1} ranks on this node, {gpus} GPUs; start at most one rank per GPU"
        seen.append(debian.see(command, 2, said, CUDA_DEVICES=gpus, **preload))
    return seen


if __name__ == "__main__":
    main()
