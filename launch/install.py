"""Unattended set-up of all that the project needs; run by `make setup`, `train`, `test`, ...

    python3 launch/install.py [--gpu] [--dev] [--data] [--test-system]

Makes .venv, installs the pinned packages there, and builds Horovod with MXNet and Gloo. Finished
steps are recorded with a digest of their inputs (.venv/installed.json) and not repeated. A failure
ends in one line that says what is missing and the command that installs it; the output of pip and
the compiler is in .venv/install.log.

Standard library only, because it runs under the system's python3, any version from 3.7 on; so does
the one module of the project that it imports.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is there, which is launch/
from launch.core import streams  # noqa: E402

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
STAMP = VENV / "installed.json"

# MXNet 1.9.1 needs a NumPy below 1.24, which has no wheels for other Pythons.
PYTHON_VERSIONS = ((3, 11), (3, 10), (3, 9), (3, 8))
MAX_GXX, MAX_GXX_CUDA = 13, 11  # Horovod 0.28.1 compiles with no later one, nor nvcc 11
BUILD_TOOLS = ("pip", "setuptools", "wheel", "packaging")  # first: other builds need them

HOROVOD_BUILD = {
    "HOROVOD_WITH_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
}
# Not `horovodrun --check-build`, which reports PyTorch as built in when it is not.
HOROVOD_CHECK = "import sys, horovod.mxnet as hvd; sys.exit(not hvd.gloo_built())"
NCCL_CHECK = HOROVOD_CHECK.replace("gloo_built()", "nccl_built()")
CUDA_CODE = "70,75,80,86"  # V100, T4, A100, RTX 30: what MXNet's wheel runs on and is in use

DATA_PACKAGE = "dataset-fashion-mnist"
# For the integration tests: Slurm, network namespaces, a browser for TensorBoard, the real data.
TEST_PACKAGES = (
    *("slurmctld", "slurmd", "slurm-client", "munge", "iproute2"),
    *("chromium", "chromium-driver", DATA_PACKAGE),
)

# Pattern in a log -> its meaning and the way out; none for lines that say it themselves.
KNOWN_FAILURES: Dict[str, Optional[str]] = {
    # All pins exist, so an index without any version of one is unreachable, or no index.
    r"NewConnectionError|[Nn]ame resolution|Read timed out|\(from versions: none\)": (
        "no network: pip cannot reach its package index. Connect this machine, or set PIP_INDEX_URL"
        " or https_proxy to what it can reach, and run the command again"
    ),
    r"No space left on device": "the disk is full: free 3 GB and run the command again",
    r"Killed signal terminated program": (
        "the compiler ran out of memory: free 2 GB and run the command again"
    ),
    r"libcuda\.so\.1: cannot open": (
        "no NVIDIA driver: libmxnet needs its libcuda.so.1. Set up on a GPU node, or install the"
        " driver (Debian: libcuda1 of non-free)"
    ),
    **dict.fromkeys(
        (r".*#error .*", r".*OSError: .*", r".*Could NOT find .*", r".*:\d+: (fatal )?error: .*")
    ),
}

say = streams.print_line


class SetupError(Exception):
    """What is missing, and the command that installs it; one line."""


class Step(NamedTuple):
    """A part of the set-up, repeated only when its key changes."""

    name: str
    label: str
    key: str
    run: Callable[[], None]


def main(arguments: Optional[List[str]] = None) -> int:
    """Run the command line; return 0, or 1 after printing why set-up stopped."""
    parser = argparse.ArgumentParser(description="Set up .venv with all that the project needs.")
    parser.add_argument("--gpu", action="store_true", help="MXNet and Horovod for NVIDIA GPUs")
    parser.add_argument("--dev", action="store_true", help="also what tests and lint need")
    parser.add_argument("--data", action="store_true", help="also find or download Fashion-MNIST")
    parser.add_argument(
        "--test-system", action="store_true", help="also Debian packages of the integration tests"
    )
    options = parser.parse_args(arguments)
    try:
        install(options.gpu, options.dev)
        if options.test_system:
            install_test_system()
        if options.data:
            find_data()
    except (SetupError, OSError) as error:
        say(f"set-up stopped: {explain(str(error))}", sys.stderr)
        return 1
    return 0


def install(gpu: bool, dev: bool) -> None:
    """Bring .venv up to date with the requirement files. A GPU installation stays one."""
    gpu = gpu or bool(read_stamp().get("gpu"))
    start = time.monotonic()
    version = usable_venv(gpu) or make_venv(gpu)
    stamp = read_stamp()
    todo = [step for step in steps(gpu, dev, version) if stamp.get(step.name) != step.key]
    for number, step in enumerate(todo, 1):
        say(f"[{number}/{len(todo)}] {step.label} ...")
        step.run()
        write_stamp(**{step.name: step.key})
    if todo:
        say(f"set-up done in {time.monotonic() - start:.0f} s")


def steps(gpu: bool, dev: bool, version: Tuple[int, int]) -> List[Step]:
    """Return all steps in order, done or not."""
    pins = read_pins("requirements.txt")
    if gpu:
        pins = [pin for pin in pins if not pin.startswith("mxnet==")]
        pins += read_pins("requirements-gpu.txt")
    horovod = next(pin for pin in pins if pin.startswith("horovod=="))
    mxnet = next(pin for pin in pins if pin.startswith("mxnet"))
    tools = [pin for pin in pins if pin.split("==")[0] in BUILD_TOOLS]
    others = [pin for pin in pins if pin != horovod and pin not in tools]
    dev_pins = read_pins("requirements-export.txt") + read_pins("requirements-dev.txt")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    places = sorted((ROOT / "trainer" / "native").glob("*.[ch]*"))
    sources = [path.read_text(encoding="utf-8") for path in places]

    def key(*parts: str) -> str:
        return hashlib.sha256("\n".join((str(version), *parts)).encode()).hexdigest()

    def install_packages() -> None:
        if output_of([str(PYTHON), "-m", "pip", "--version"]) is None:  # making .venv was cut short
            run_logged([str(PYTHON), "-m", "ensurepip"])
        pip_install(*tools)
        pip_install(*others)
        link_cuda_libraries()
        failure = run_logged([str(PYTHON), "-c", "import mxnet"])
        if failure:
            raise SetupError(f"MXNet is installed but does not load: {failure} (log: {LOG})")

    label = f"building Horovod with MXNet and {'NCCL' if gpu else 'Gloo'} (minutes on 2 cores)"
    build = key(horovod, mxnet, *HOROVOD_BUILD), partial(build_horovod, horovod, gpu)
    project = key(pyproject), partial(pip_install, "-e", str(ROOT))
    native = key(mxnet, *sources), compile_native
    of_dev = key(*dev_pins), partial(pip_install, *dev_pins)
    result = [
        Step("packages", "installing the pinned packages", key(*tools, *others), install_packages),
        Step("horovod", label, *build),
        Step("project", "installing this project into .venv, editable", *project),
        Step("native", "compiling the C++ of batch norm and updates", *native),
        Step("dev", "installing the packages of tests and lint", *of_dev),
    ]
    return result if dev else result[:-1]


def usable_venv(gpu: bool) -> Optional[Tuple[int, int]]:
    """Return the Python version of .venv, or None if it must be created, or recreated.

    It is recreated if its Python is gone, if it was moved (its scripts contain its path), and if
    GPU support is added (both builds of MXNet install the same files).
    """
    stamp = read_stamp()
    version = python_version(str(PYTHON))
    same = stamp.get("folder", str(VENV)) == str(VENV) and bool(stamp.get("gpu", gpu)) == gpu
    return version if version in PYTHON_VERSIONS and same else None


def make_venv(gpu: bool) -> Tuple[int, int]:
    """Create .venv, after checking the machine for everything that later steps need."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SetupError(
            f"this is {sys.platform} on {platform.machine()}, and MXNet 1.9.1 is built for Linux on"
            " x86_64 alone: use such a machine or container"
        )
    if VENV.is_symlink():  # it would be emptied where it is, for whoever else uses it
        raise SetupError(
            f"{VENV} is a link to {VENV.resolve()}, and an environment serves one folder, the path"
            " in its scripts: remove the link"
        )
    if PYTHON.exists() and not read_stamp():
        raise SetupError(
            f"{VENV} is not of this project's making, and its Python is none of 3.8 to 3.11:"
            " remove it, or move it away"
        )
    command, version = find_python()
    dotted = "{}.{}".format(*version)
    if output_of([command, "-c", "import venv, ensurepip"]) is None:
        raise SetupError(f"Python {dotted} has no venv: `{apt_get(f'python{dotted}-venv')}`")
    find_compiler(gpu)
    if gpu:
        check_cuda()
    say(f"making .venv with Python {dotted}")
    VENV.mkdir(exist_ok=True)
    failure = run_logged([command, "-m", "venv", "--clear", str(VENV)])
    if failure:
        raise SetupError(f"cannot make {VENV}: {failure}")
    write_stamp(folder=str(VENV), gpu=gpu)
    return version


def find_python() -> Tuple[str, Tuple[int, int]]:
    """Return the command and version of a supported Python: this one, or the newest on PATH."""
    for command in (sys.executable, *("python{}.{}".format(*v) for v in PYTHON_VERSIONS)):
        version = python_version(command)
        if version in PYTHON_VERSIONS:
            return command, version
    raise SetupError(
        f"python3 is {platform.python_version()}, and PATH has no Python 3.8 to 3.11, which MXNet"
        " 1.9.1 needs: `pip install uv && uv python install 3.11`, or on Ubuntu"
        " `add-apt-repository ppa:deadsnakes/ppa && apt-get install python3.11-venv`"
    )


def python_version(command: str) -> Optional[Tuple[int, int]]:
    """Return (major, minor), or None where the command is absent or, like pyenv's shims, fails."""
    printed = output_of([command, "-c", "import sys; print(*sys.version_info[:2])"])
    if printed is None:
        return None
    major, minor = printed.split()
    return int(major), int(minor)


def find_compiler(gpu: bool = False) -> Dict[str, str]:
    """Return CC and CXX for Horovod's build: none if $CXX is set, else the first suitable g++."""
    if shutil.which("make") is None:
        raise SetupError(f"no make: `{apt_get('make')}`")
    newest, user = (MAX_GXX_CUDA, "nvcc 11") if gpu else (MAX_GXX, "Horovod")
    compiler, limit = os.environ.get("CXX"), f"{user} needs {newest} or older"
    if compiler:
        printed = output_of([*shlex.split(compiler), "--version"])
        if printed is None:
            raise SetupError(f"CXX is {compiler}, which does not run: unset it, or correct it")
        gnu = re.match(r"\S*g\+\+\S* \(.*\) (\d+)", printed)
        if gnu and int(gnu[1]) > newest:
            raise SetupError(f"CXX is {compiler}, g++ {gnu[1]}, {limit}: unset CXX")
        return {}
    too_new = None
    for gxx in ("g++", "g++-13", "g++-12", "g++-11", "g++-10", "g++-9"):
        version = output_of([gxx, "-dumpversion"])
        if version and int(version.split(".")[0]) <= newest:
            return {"CXX": gxx, "CC": gxx.replace("g++", "gcc")}
        too_new = too_new or version
    if too_new:
        way_out = apt_get("g++-11" if gpu else "g++-12")
        raise SetupError(f"g++ is version {too_new}, {limit}: `{way_out}`")
    raise SetupError(f"no C++ compiler: `{apt_get('g++-11' if gpu else 'g++')}`")


def check_cuda() -> None:
    """Raise SetupError without CUDA 11's compiler where Horovod's build looks, and a driver."""
    home = os.environ.get("HOROVOD_CUDA_HOME")
    printed = output_of([f"{home}/bin/nvcc" if home else "nvcc", "--version"])
    release = re.search(r"release (\d+)\.(\d+)", printed or "")
    if release is None or release[1] != "11":
        found = f"nvcc is CUDA {release[1]}.{release[2]}'s" if release else "no nvcc"
        raise SetupError(
            f"{found} {'in HOROVOD_CUDA_HOME' if home else 'on PATH'}: Horovod's build takes CUDA"
            " 11's. Install NVIDIA's CUDA toolkit 11.7 or 11.8 (Debian 12: nvidia-cuda-toolkit"
            " of non-free) and set HOROVOD_CUDA_HOME to its folder, which has bin/nvcc"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SetupError(explain(str(error))) from None


def link_cuda_libraries() -> None:
    """Link those of NVIDIA's wheels beside libmxnet, which looks there first ($ORIGIN)."""
    for library in VENV.glob("lib/python3*/site-packages/nvidia/*/lib/lib*.so.*"):
        mxnet = library.parents[3] / "mxnet"
        names = (library.name, "libnccl.so") if "libnccl" in library.name else (library.name,)
        for name in names:  # by the latter Horovod's build finds it
            link = mxnet / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(os.path.relpath(str(library), str(mxnet)))


def gpu_build() -> Dict[str, str]:
    """Return what Horovod's build needs beyond HOROVOD_BUILD on GPUs."""
    answer = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    answer = answer.replace("8.9", "8.6")  # whose code it runs; nvcc 11.7 makes none of 8.9
    found = sorted(set(re.findall(r"^\d+\.\d$", answer, re.MULTILINE)), key=float)
    here = ",".join(found).replace(".", "") or CUDA_CODE
    wheels = next(VENV.glob("lib/python3*/site-packages"), VENV)
    headers = [str(wheels / "nvidia" / name / "include") for name in ("cudnn", "nccl")]
    return {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_BUILD_CUDA_CC_LIST": os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST", here),
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_NCCL_INCLUDE": headers[1],
        "HOROVOD_NCCL_LIB": str(wheels / "mxnet"),
        "CPATH": os.pathsep.join(filter(None, [os.environ.get("CPATH"), *headers])),
    }


def build_horovod(pin: str, gpu: bool) -> None:
    """Install Horovod, built with MXNet and Gloo, and NCCL on GPUs, and check that it loads."""
    env = {**HOROVOD_BUILD, **find_compiler(gpu)}
    env["HOROVOD_CMAKE"] = str(VENV / "bin" / "cmake")  # PATH may have cmake 4, or none
    # Not inherited from the make that runs this script, which would serialize the build.
    env["MAKEFLAGS"] = f"-j{min(os.cpu_count() or 1, 8)}"
    check = NCCL_CHECK if gpu else HOROVOD_CHECK
    if gpu:
        check_cuda()
        env.update(gpu_build())
    else:
        pip_install(pin, env=env)
    if gpu or not horovod_works(check):
        # pip's cache may hold a wheel of this version built for another framework.
        pip_install("--force-reinstall", "--no-cache-dir", pin, env=env)
    if not horovod_works(check):
        raise SetupError(f"Horovod is built but does not work: see `{PYTHON} -c '{check}'`")
    if gpu:
        write_stamp(cuda_code=env["HOROVOD_BUILD_CUDA_CC_LIST"])


def horovod_works(check: str) -> bool:
    """Whether .venv's Horovod loads and was built with MXNet and Gloo, or NCCL."""
    return output_of([str(PYTHON), "-c", check]) is not None


def compile_native() -> None:
    """Compile ahead of the first step. If this fails, ranks use slower code without it."""
    failure = run_logged([str(PYTHON), "-m", "trainer.native.compile"], find_compiler())
    if failure:
        say(f"synced batch norm and updates will run without C++, which is slower: {failure}")


def find_data() -> None:
    """Find or download Fashion-MNIST; failing that, as root on Debian, install its package."""
    known = read_stamp().get("data")
    if isinstance(known, str) and len(list(Path(known).glob("*-ubyte*"))) >= 4:
        return
    say("looking for Fashion-MNIST")
    command = [str(PYTHON), "-m", "trainer.data.fashion_mnist"]
    search = partial(subprocess.run, command, cwd=str(ROOT), stdout=subprocess.PIPE, text=True)
    done = search()
    if done.returncode and apt_get_install(DATA_PACKAGE, why="no mirror can be reached"):
        done = search()
    printed = done.stdout.strip()
    if done.returncode:
        raise SetupError(printed)
    say(f"Fashion-MNIST is in {printed}")
    write_stamp(data=printed)


def install_test_system() -> None:
    """Install the Debian packages for the integration tests, or say that some will be skipped."""
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}"]
    missing = [name for name in TEST_PACKAGES if output_of([*query, name]) != "installed"]
    if missing and not apt_get_install(*missing, why="for the integration tests"):
        say(f"some integration tests will be skipped; `{apt_get(*missing)}` brings what they need")


def apt_get_install(*packages: str, why: str) -> bool:
    """Install Debian packages, where this user may; return whether they were."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    say(f"{why}: installing Debian's {' '.join(packages)}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
    run_logged([*command, "update"], env)
    return run_logged([*command, "--no-install-recommends", "install", *packages], env) is None


def apt_get(*packages: str) -> str:
    """Return the command that installs the packages, for a message."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get install {' '.join(packages)}"


def pip_install(*arguments: str, env: Optional[Dict[str, str]] = None) -> None:
    """Install into .venv, without dependencies; raise SetupError with the reason of a failure."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    failure = run_logged([*command, "--no-deps", "--no-build-isolation", *arguments], env)
    if failure:
        raise SetupError(f"{failure} (log: {LOG})")


def run_logged(command: List[str], env: Optional[Dict[str, str]] = None) -> Optional[str]:
    """Run a command with its output in the log; return None, or why it failed."""
    with LOG.open("a+", encoding="utf-8", errors="replace") as log:
        start = log.seek(0, os.SEEK_END)
        print("$", *command, file=log, flush=True)
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.seek(start)
        return explain(log.read()) if done.returncode else None


def explain(text: str) -> str:
    """Condense the output of a failed command to one line."""
    for pattern, meaning in KNOWN_FAILURES.items():
        found = re.search(pattern, text)
        if found:
            return meaning or found[0].strip()
    lines = text.strip().splitlines() or ["it failed without a word"]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (errors or lines)[-1].strip()


def output_of(command: List[str]) -> Optional[str]:
    """Return the output of a command, stripped, or None if it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def read_pins(name: str) -> List[str]:
    """Return the lines of a requirement file without comments, sorted."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return sorted(filter(None, (line.split("#")[0].strip() for line in lines)))


def read_stamp() -> Dict[str, object]:
    """Return the entries of installed.json; none if it is missing or damaged."""
    try:
        return dict(json.loads(STAMP.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def write_stamp(**entries: object) -> None:
    """Record entries, atomically: without its record, set-up would refuse .venv as not its own."""
    partial = STAMP.with_name(f"{STAMP.name}.partial")
    partial.write_text(json.dumps({**read_stamp(), **entries}, indent=1), encoding="utf-8")
    partial.replace(STAMP)


if __name__ == "__main__":
    streams.run(main)
