"""Set-up: errors are one line, finished steps are not repeated, the pins agree.

Nothing is installed except one empty virtual environment: compilers and Pythons are stand-ins on
PATH, and pip is recorded. The rest is covered by `make setup` in a fresh clone (.ci/run).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import install
from launch.install import SetupError

ROOT = Path(__file__).parents[3]
FILES = (
    "requirements.txt",
    "requirements-gpu.txt",
    "requirements-export.txt",
    "requirements-dev.txt",
    "pyproject.toml",
    "trainer/native/batch_norm.cc",
    "trainer/native/sums.h",
)
INSTALLED = ("requirements.txt", "requirements-export.txt", "requirements-dev.txt")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project of its own: its requirement files, and an empty .venv."""
    root = tmp_path / "project"
    for folder in (".venv", "trainer/native"):
        (root / folder).mkdir(parents=True)
    for name in FILES:
        shutil.copy(str(ROOT / name), str(root / name))
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(install, "VENV", root / ".venv")
    monkeypatch.setattr(install, "PYTHON", root / ".venv" / "bin" / "python")
    monkeypatch.setattr(install, "LOG", root / ".venv" / "install.log")
    monkeypatch.setattr(install, "STAMP", root / ".venv" / "installed.json")
    return root


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Make PATH a folder of stand-ins; `programs(name, body)` adds one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for variable in ("CC", "CXX", "HOROVOD_CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def add(name, body="exit 0"):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return add


@pytest.fixture
def pip(tree, monkeypatch):
    """Record pip's arguments in place of running it, in a .venv that has Python 3.11."""
    calls = []
    monkeypatch.setattr(install, "usable_venv", lambda gpu: (3, 11))
    monkeypatch.setattr(install, "pip_install", lambda *args, env=None: calls.append((args, env)))
    monkeypatch.setattr(install, "horovod_works", lambda check: True)
    monkeypatch.setattr(install, "compile_native", lambda: None)
    monkeypatch.setattr(install, "run_logged", lambda command: None)  # MXNet loads
    monkeypatch.setattr(install, "check_cuda", lambda: None)
    monkeypatch.setattr(install, "find_compiler", lambda gpu=False: {"CXX": "g++", "CC": "gcc"})
    return calls


def installed_by(calls):
    return [argument for arguments, _ in calls for argument in arguments]


# -- what is missing -------------------------------------------------------------------------


def test_no_make(programs):
    programs("g++", "echo 12")
    with pytest.raises(SetupError, match="^no make: `(sudo )?apt-get install make`$"):
        install.find_compiler()


def test_no_compiler(programs):
    programs("make")
    with pytest.raises(SetupError, match=r"^no C\+\+ compiler: `(sudo )?apt-get install g\+\+`$"):
        install.find_compiler()


def test_compiler_too_new(programs):
    programs("make")
    programs("g++", "echo 14")
    with pytest.raises(
        SetupError, match=r"g\+\+ is version 14, .*`(sudo )?apt-get install g\+\+-12`$"
    ):
        install.find_compiler()


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({"g++": "12"}, "g++"),
        ({"g++": "13.3.0"}, "g++"),
        ({"g++": "14", "g++-12": "12", "g++-14": "14"}, "g++-12"),
        ({"g++": "14", "g++-11": "11", "g++-13": "13"}, "g++-13"),
        ({"g++-11": "11.4"}, "g++-11"),
    ],
)
def test_compiler_is_the_first_that_is_not_too_new(programs, versions, chosen):
    programs("make")
    for name, version in versions.items():
        programs(name, f"echo {version}")
    assert install.find_compiler() == {"CXX": chosen, "CC": chosen.replace("g++", "gcc")}


def test_compiler_of_the_user(programs, monkeypatch):
    programs("make")
    programs("g++", "echo 14")
    programs("clang++-15")
    programs("ccache")
    for asked in ("clang++-15", "ccache clang++-15"):
        monkeypatch.setenv("CXX", asked)
        assert install.find_compiler() == {}  # the build reads CXX itself
    monkeypatch.setenv("CXX", "clang++-99")
    with pytest.raises(SetupError, match=r"CXX is clang\+\+-99, which does not run"):
        install.find_compiler()


def test_no_suitable_python(programs, monkeypatch):
    monkeypatch.setattr(sys, "executable", programs("python3", "echo 3 12"))
    programs("python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    with pytest.raises(SetupError, match=r"PATH has no Python 3\.8 to 3\.11.*uv python install"):
        install.find_python()


def test_python_is_the_newest_suitable_on_path(programs, monkeypatch):
    monkeypatch.setattr(sys, "executable", programs("python3", "echo 3 13"))
    programs("python3.11", "exit 127")  # as pyenv's shims do
    programs("python3.10", "echo 3 10")
    programs("python3.8", "echo 3 8")
    assert install.find_python() == ("python3.10", (3, 10))
    monkeypatch.setattr(sys, "executable", programs("python3", "echo 3 9"))
    assert install.find_python() == (sys.executable, (3, 9))


def test_python_without_venv(tree, programs, monkeypatch):
    body = 'case "$2" in *ensurepip*) exit 1;; *) echo 3 10;; esac'
    monkeypatch.setattr(sys, "executable", programs("python3", body))
    with pytest.raises(
        SetupError, match=r"^Python 3\.10 has no venv: `(sudo )?apt-get install python3\.10-venv`$"
    ):
        install.make_venv(gpu=False)


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "arm64")])
def test_other_machines(tree, monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(install.platform, "machine", lambda: machine)
    with pytest.raises(SetupError, match=f"this is {system} on {machine}.*Linux on x86_64 alone"):
        install.make_venv(gpu=False)


@pytest.fixture
def driver(monkeypatch):
    """A machine that has one."""
    monkeypatch.setattr(install.ctypes, "CDLL", lambda name: None)


def nvcc(release):
    return f"echo 'Cuda compilation tools, release {release}, V{release}.89'"


def test_no_nvcc(programs, driver, tmp_path, monkeypatch):
    with pytest.raises(SetupError, match="^no nvcc on PATH: .*CUDA toolkit 11.7 or 11.8"):
        install.check_cuda()
    programs("nvcc", nvcc("11.8"))
    install.check_cuda()
    monkeypatch.setenv("HOROVOD_CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(SetupError, match="^no nvcc in HOROVOD_CUDA_HOME"):
        install.check_cuda()


@pytest.mark.parametrize("release", ["13.0", "12.4", "10.2"])
def test_nvcc_of_another_cuda(programs, driver, release):
    programs("nvcc", nvcc(release))
    with pytest.raises(SetupError, match=f"^nvcc is CUDA {release}'s on PATH.* CUDA 11's"):
        install.check_cuda()


def test_no_driver(programs, monkeypatch):
    programs("nvcc", nvcc("11.7"))

    def fail(name):
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(install.ctypes, "CDLL", fail)
    with pytest.raises(SetupError, match="^no NVIDIA driver: libmxnet needs its libcuda.so.1"):
        install.check_cuda()


@pytest.mark.parametrize("gpu", [False, True])
def test_nvcc_11_takes_no_gxx_above_11(programs, monkeypatch, gpu):
    programs("make")
    programs("g++", "case $1 in --version) echo 'g++ (Debian 12.2.0-14) 12.2.0';; *) echo 12; esac")
    if gpu:
        with pytest.raises(SetupError, match=r"g\+\+ is version 12, nvcc 11 needs 11 .*g\+\+-11`$"):
            install.find_compiler(gpu)
    programs("g++-11", "echo 11")
    assert install.find_compiler(gpu)["CXX"] == ("g++-11" if gpu else "g++")
    monkeypatch.setenv("CXX", "g++")
    if gpu:
        with pytest.raises(SetupError, match=r"^CXX is g\+\+, g\+\+ 12, nvcc 11 needs 11 or older"):
            install.find_compiler(gpu)
    else:
        assert install.find_compiler(gpu) == {}


def test_libraries_of_the_wheels_lie_beside_libmxnet(tree):
    packages = tree / ".venv/lib/python3.11/site-packages"
    for folder in ("mxnet", "nvidia/cudnn/lib", "nvidia/nccl/lib"):
        (packages / folder).mkdir(parents=True)
    for name in ("cudnn/lib/libcudnn.so.8", "nccl/lib/libnccl.so.2"):
        (packages / "nvidia" / name).write_text(name)
    for _ in range(2):  # again after another version was installed
        install.link_cuda_libraries()
    found = {path.name: path.read_text() for path in (packages / "mxnet").iterdir()}
    assert found["libcudnn.so.8"] == "cudnn/lib/libcudnn.so.8"
    assert found["libnccl.so.2"] == found["libnccl.so"] == "nccl/lib/libnccl.so.2"
    shutil.move(str(tree), str(tree.with_name("moved")))  # a container copies it elsewhere
    assert (
        tree.with_name("moved") / ".venv/lib/python3.11/site-packages/mxnet/libnccl.so"
    ).exists()


def test_mxnet_that_does_not_load_stops_before_horovod_is_built(pip, monkeypatch):
    monkeypatch.setattr(install, "run_logged", lambda command: "OSError: libfoo.so.1: gone")
    with pytest.raises(SetupError, match="MXNet is installed but does not load: OSError: libfoo"):
        install.install(gpu=True, dev=False)
    assert "horovod==0.28.1" not in installed_by(pip)


@pytest.mark.parametrize(
    ("answer", "given", "built_for"),
    [
        ("exit 9", None, "70,75,80,86"),
        ("printf '8.0\\n8.0\\n7.0\\n'", None, "70,80"),
        ("printf '8.9\\n8.0\\n8.9\\n'", None, "80,86"),  # nvcc 11.7 has no compute_89
        ("printf '8.0\\n'", "60,80", "60,80"),
    ],
)
def test_horovod_is_built_for_the_gpus_of_the_machine(
    pip, programs, driver, monkeypatch, answer, given, built_for
):
    programs("nvidia-smi", answer)
    programs("nvcc", nvcc("11.8"))
    programs("printf", 'exec /usr/bin/printf "$@"')
    if given:
        monkeypatch.setenv("HOROVOD_BUILD_CUDA_CC_LIST", given)
    install.build_horovod("horovod==0.28.1", gpu=True)
    ((_, env),) = pip
    assert env["HOROVOD_BUILD_CUDA_CC_LIST"] == built_for
    assert install.read_stamp()["cuda_code"] == built_for
    assert env["CPATH"].endswith("nvidia/nccl/include")


def test_no_network_is_one_line(tree):
    """The real script and the real pip, asked for what nobody has, of an index nobody serves."""
    (tree / "launch").mkdir()
    script = shutil.copy(str(ROOT / "launch" / "install.py"), str(tree / "launch"))
    (tree / ".venv" / "bin").mkdir()
    python = tree / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = tree / "requirements.txt"
    path.write_text(path.read_text().replace("wheel==", "wheel==0.0.0."))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env.update(PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("set-up stopped: no network: pip cannot reach its package index.")
    assert line.endswith(f"(log: {tree / '.venv' / 'install.log'})")
    assert "127.0.0.1" in (tree / ".venv" / "install.log").read_text()


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("WARNING: ...\nERROR: [Errno 28] No space left on device\n", "the disk is full"),
        ("c++: fatal error: Killed signal terminated program cc1plus\n", "ran out of memory"),
        ("socket.gaierror: Temporary failure in name resolution\nERROR: None\n", "no network"),
        ("a.cc:3:1: error: expected ';'\nmake: *** [a.o] Error 1\n", "^a.cc:3:1: error: expected"),
        (  # what set-up's log holds of an nvcc 11 with g++ 12, of nvcc 13, and of a lost library
            "/usr/include/crt/host_config.h:132:2: error: #error -- unsupported GNU version!\n"
            "ERROR: Failed building wheel for horovod\n",
            "#error -- unsupported GNU version",
        ),
        (
            "CMake Error:\n  Could NOT find CUDAToolkit (missing: CUDA_CUDART)\n"
            "ERROR: Could not build wheels for horovod\n",
            r"^Could NOT find CUDAToolkit \(missing: CUDA_CUDART\)$",
        ),
        (
            "OSError: libcudnn.so.8: cannot open\nCould NOT find Mxnet\nerror: metadata\n",
            "^OSError: libcudnn.so.8: cannot open$",
        ),
        ("OSError: libcuda.so.1: cannot open shared object file", "^no NVIDIA driver"),
        ("something went wrong\nhere\n\n", "here"),
        ("", "it failed without a word"),
    ],
)
def test_log_is_condensed_to_one_line(log, line):
    assert re.search(line, install.explain(log))
    assert "\n" not in install.explain(log)


def test_a_full_disk_is_one_line_and_keeps_the_record(pip, tree, capsys):
    install.write_stamp(folder=str(tree))
    (tree / ".venv" / "installed.json.partial").symlink_to("/dev/full")
    assert install.main([]) == 1
    assert capsys.readouterr().err.startswith("set-up stopped: the disk is full: free 3 GB")
    assert install.read_stamp() == {"folder": str(tree)}


def test_failure_is_reported_on_one_line_with_exit_code_1(tree, monkeypatch, capsys):
    def fail(*arguments):
        raise SetupError("no make: `apt-get install make`")

    monkeypatch.setattr(install, "install", fail)
    assert install.main([]) == 1
    assert capsys.readouterr().err == "set-up stopped: no make: `apt-get install make`\n"


# -- what is done, and not done again --------------------------------------------------------


def test_horovod_comes_after_mxnet_and_alone(pip):
    install.install(gpu=False, dev=True)
    calls = [arguments for arguments, _ in pip]
    tools, packages, horovod, project, dev = calls
    assert {pin.split("==")[0] for pin in tools} == set(install.BUILD_TOOLS)
    assert "mxnet==1.9.1" in packages and "d2lzh==1.0.0" in packages
    assert horovod == ("horovod==0.28.1",)
    assert project == ("-e", str(install.ROOT))
    assert any(pin.startswith("pytest==") for pin in dev)


def test_second_run_does_nothing(pip, capsys):
    install.install(gpu=False, dev=True)
    assert "set-up done" in capsys.readouterr().out
    pip.clear()
    install.install(gpu=False, dev=True)
    install.install(gpu=False, dev=False)
    assert pip == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "old", "new", "again"),
    [
        ("requirements-dev.txt", "pytest==", "pytest==0.", {"dev"}),
        ("requirements.txt", "PyYAML==", "PyYAML==0.", {"packages"}),
        ("requirements.txt", "mxnet==", "mxnet==0.", {"packages", "horovod", "native"}),
        ("requirements.txt", "horovod==", "horovod==0.", {"horovod"}),
        ("requirements.txt", "# Building", "# Other words", set()),
        ("pyproject.toml", "version", "# changed\nversion", {"project"}),
        ("trainer/native/batch_norm.cc", "int", "long", {"native"}),
        ("trainer/native/sums.h", "int", "long", {"native"}),
    ],
)
def test_a_change_redoes_what_depends_on_it(pip, name, old, new, again):
    def keys():
        return {step.name: step.key for step in install.steps(False, True, (3, 11))}

    before = keys()
    path = install.ROOT / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after = keys()
    assert {step for step in after if after[step] != before[step]} == again


def test_another_python_redoes_all(tree):
    ours = {step.key for step in install.steps(False, True, (3, 11))}
    assert not ours & {step.key for step in install.steps(False, True, (3, 10))}


def test_a_failed_step_is_where_the_next_run_begins(pip, monkeypatch):
    def fail(pin, gpu):
        raise SetupError("no C++ compiler")

    with monkeypatch.context() as broken:
        broken.setattr(install, "build_horovod", fail)
        with pytest.raises(SetupError):
            install.install(gpu=False, dev=False)
    pip.clear()
    install.install(gpu=False, dev=False)
    assert installed_by(pip) == ["horovod==0.28.1", "-e", str(install.ROOT)]


def test_horovod_build_ignores_cmake_and_flags_outside(pip, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", " -- RANKS=2")
    install.build_horovod("horovod==0.28.1", gpu=False)
    ((arguments, env),) = pip
    assert arguments == ("horovod==0.28.1",)
    assert env["HOROVOD_CMAKE"] == str(install.VENV / "bin" / "cmake")
    assert re.fullmatch(r"-j\d+", env["MAKEFLAGS"])
    assert env["CXX"] == "g++"
    assert env["HOROVOD_WITH_MXNET"] == env["HOROVOD_WITH_GLOO"] == "1"


def test_a_cached_wheel_for_another_framework_is_rebuilt(pip, monkeypatch):
    works = iter([False, True])
    monkeypatch.setattr(install, "horovod_works", lambda check: next(works))
    install.build_horovod("horovod==0.28.1", gpu=False)
    assert [arguments for arguments, _ in pip] == [
        ("horovod==0.28.1",),
        ("--force-reinstall", "--no-cache-dir", "horovod==0.28.1"),
    ]


def test_horovod_that_does_not_work_is_reported(pip, monkeypatch):
    monkeypatch.setattr(install, "horovod_works", lambda check: False)
    with pytest.raises(SetupError, match="^Horovod is built but does not work: see `.*python -c"):
        install.build_horovod("horovod==0.28.1", gpu=False)


def test_gpu_takes_the_other_mxnet_and_stays(pip, tree):
    install.write_stamp(gpu=True)
    install.install(gpu=False, dev=False)
    packages = installed_by(pip)
    assert "mxnet-cu117==1.9.1" in packages and "mxnet==1.9.1" not in packages
    ((_, env),) = [call for call in pip if "horovod==0.28.1" in call[0]]
    assert env["HOROVOD_GPU_OPERATIONS"] == "NCCL"


@pytest.mark.parametrize(
    ("stamp", "gpu", "version", "usable"),
    [
        ({}, False, (3, 11), True),
        ({"folder": "same", "gpu": False}, False, (3, 8), True),
        ({"folder": "same", "gpu": True}, True, (3, 8), True),
        ({"folder": "/elsewhere/.venv"}, False, (3, 11), False),
        ({"folder": "same", "gpu": False}, True, (3, 11), False),
        ({}, False, (3, 12), False),
        ({}, False, None, False),
    ],
)
def test_venv_is_kept_while_it_can_be(tree, monkeypatch, stamp, gpu, version, usable):
    monkeypatch.setattr(install, "python_version", lambda command: version)
    if stamp.get("folder") == "same":
        stamp = {**stamp, "folder": str(install.VENV)}
    install.write_stamp(**stamp)
    assert install.usable_venv(gpu) == (version if usable else None)


def test_a_venv_that_was_moved_is_recreated_empty(tree, tmp_path, monkeypatch):
    real, without_pip = sys.executable, tmp_path / "python"  # pip would take seconds
    without_pip.write_text(
        f'#!/bin/sh\n[ "$2" = venv ] && set -- "$@" --without-pip\nexec {real} "$@"'
    )
    without_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without_pip))
    install.write_stamp(folder="/elsewhere/.venv", gpu=False, packages="done")
    (tree / ".venv" / "bin").mkdir()
    (tree / ".venv" / "bin" / "horovodrun").write_text("#!/elsewhere/.venv/bin/python")
    version = install.make_venv(gpu=False)
    assert version == install.usable_venv(gpu=False) == install.python_version(str(install.PYTHON))
    assert install.read_stamp() == {"folder": str(tree / ".venv"), "gpu": False}
    assert not (tree / ".venv" / "bin" / "horovodrun").exists()


def test_a_venv_without_pip_gets_it(tree, monkeypatch):
    """As it is left where the first set-up is interrupted in its first seconds."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(install.VENV)], check=True)
    version = [str(install.PYTHON), "-m", "pip", "--version"]
    assert install.usable_venv(gpu=False) == sys.version_info[:2]
    assert install.output_of(version) is None
    monkeypatch.setattr(install, "pip_install", lambda *pins: None)
    packages = install.steps(gpu=False, dev=False, version=(3, 11))[0]
    with pytest.raises(SetupError, match="No module named 'mxnet'"):  # as pip was not asked for it
        packages.run()
    assert install.output_of(version).startswith("pip ")


def test_venv_of_another_making_is_left_alone(tree, programs):
    (tree / ".venv" / "bin").mkdir()
    shutil.move(programs("python3", "echo 3 12"), str(install.PYTHON))
    with pytest.raises(SetupError, match=r"is not of this project's making.*remove it, or move"):
        install.install(gpu=False, dev=False)
    assert install.PYTHON.exists()


def test_venv_that_is_a_link_is_not_emptied_where_it_is(tree, tmp_path):
    (tree / ".venv").rename(tmp_path / "another")
    (tree / ".venv").symlink_to(tmp_path / "another")
    install.write_stamp(folder="/elsewhere/.venv", gpu=False, packages="done")
    with pytest.raises(SetupError, match=r"\.venv is a link to .*another, and .* remove the link"):
        install.make_venv(gpu=False)
    assert install.read_stamp() and (tree / ".venv").is_symlink()


# -- the Makefile ----------------------------------------------------------------------------


def make(*arguments):
    """As typed by hand, not by the make that may have started this test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-C", str(ROOT), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("config", "arguments", "wanted"),
    [
        ("name: mine", "optimizer.lr=0.1", True),
        ("# data.dataset: folder", "", True),
        ("data: {dataset: idx, folder: here}", "", False),
        ("data:\n  dataset: records", "", False),
        ("data.folder: here", "", False),
        ("name: mine", "data.dataset=fashion_mnist_sample", False),
    ],
)
def test_training_on_data_of_ones_own_needs_no_fashion_mnist(tmp_path, config, arguments, wanted):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{config}\n")
    shown = make("--dry-run", "train", f"CONFIG={path}", f"ARGS={arguments}").stdout
    assert ("--data" in shown) == wanted, shown


def test_a_preset_needs_fashion_mnist_by_its_name_too():
    assert "--data" in make("--dry-run", "train", "CONFIG=quickstart").stdout


def test_a_python_that_is_too_old_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # as 3.6 answers whether it is 3.7
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}")
    said = f"set-up stopped: {old} is not 3.7 or later: export PYTHON=python3.11"
    assert done.stderr.splitlines()[0] == said


# -- data and Debian's packages --------------------------------------------------------------


@pytest.fixture
def search(tree):
    """A stand-in for `python -m trainer.data.fashion_mnist`, which finds what lies in tree/data."""
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f"#!/bin/sh\n[ -d {tree}/data ] && echo {tree}/data && exit\necho none; exit 1"
    )
    python.chmod(0o755)

    def provide(*packages):
        (tree / "data").mkdir()
        for number in range(4):
            (tree / "data" / f"{number}-ubyte.gz").touch()
        return True

    return provide


def test_data_that_is_there_is_not_looked_for_again(search, tree, monkeypatch, capsys):
    search()
    install.find_data()
    assert f"Fashion-MNIST is in {tree}/data" in capsys.readouterr().out
    install.find_data()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(install.os, "geteuid", lambda: 1000)
    shutil.rmtree(str(tree / "data"))
    with pytest.raises(SetupError, match="^none$"):
        install.find_data()


@pytest.fixture
def apt_get(programs, tree, monkeypatch):
    """What root's apt-get was asked for; it brings data."""
    files = " ".join(f"{tree}/data/{number}-ubyte.gz" for number in range(4))
    bring = f"/bin/mkdir -p {tree}/data; : | /usr/bin/tee {files}"
    programs("apt-get", f'echo "$*" >> {tree}/asked; case "$*" in *" install "*) {bring};; esac')
    monkeypatch.setattr(install.os, "geteuid", lambda: 0)
    return tree / "asked"


def test_data_from_debian_where_mirrors_fail(search, apt_get, tree, capsys):
    install.find_data()
    out = capsys.readouterr().out
    assert "no mirror can be reached: installing Debian's dataset-fashion-mnist\n" in out
    update, package = apt_get.read_text().splitlines()
    assert update.endswith(" update") and package.endswith(" install dataset-fashion-mnist")
    assert install.read_stamp()["data"] == f"{tree}/data"


def test_no_data_ends_in_what_the_search_said(search, monkeypatch):
    monkeypatch.setattr(install.os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match="^none$"):
        install.find_data()


@pytest.mark.parametrize("root", [True, False])
def test_test_system_installs_only_missing_packages(programs, apt_get, monkeypatch, capsys, root):
    programs("dpkg-query", 'case "$4" in slurmd|munge) exit 1;; *) echo installed;; esac')
    if not root:
        monkeypatch.setattr(install.os, "geteuid", lambda: 1000)
    install.install_test_system()
    out = capsys.readouterr().out
    assert apt_get.exists() == root
    if root:
        assert apt_get.read_text().endswith(" install slurmd munge\n")
        assert out == "for the integration tests: installing Debian's slurmd munge\n"
    else:
        assert "will be skipped; `sudo apt-get install slurmd munge` brings" in out


def test_continuous_integration_sees_what_a_new_user_sees(programs, tmp_path):
    """An empty HOME for each, PATH, and nothing else of this shell's environment."""
    programs("make", f'echo "$1" >> {tmp_path}/seen; env >> {tmp_path}/seen; ls -A "$HOME" >&2')
    for name in ("bash", "dirname", "env", "mktemp", "rm", "ls"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name, path="/usr/bin:/bin"))
    done = subprocess.run(
        [str(ROOT / ".ci" / "run")],
        env={"PATH": str(tmp_path / "bin"), "PYTHONUNBUFFERED": "1", "HOME": "/root"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line for line in seen if "=" not in line] == ["lint", "test"]
    names = {line.split("=")[0] for line in seen if "=" in line}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {
        "HOME",
        "PATH",
        "CI",
    }  # those are the shell's
    homes = {line for line in seen if line.startswith("HOME=")}
    assert len(homes) == 2 and "HOME=/root" not in homes


# -- the pins --------------------------------------------------------------------------------


def pins(*names):
    requirements = [Requirement(pin) for name in names for pin in install.read_pins(name)]
    return {
        canonicalize_name(requirement.name): requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def test_every_pin_is_exact():
    for name in FILES[:4]:
        for pin in install.read_pins(name):
            assert re.match(r"[\w-]+==[\w.]+(; python_version [<>]=? \"3\.\d+\")?$", pin), pin


def test_what_is_installed_is_what_is_pinned():
    for name, pin in pins(*INSTALLED).items():
        assert importlib.metadata.version(name) in pin.specifier, name


def test_pins_are_closed_under_dependencies():
    """As the packages are installed without dependencies, the list must hold them all."""
    locked = pins(*INSTALLED)
    missing = set()
    for name in locked:
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            pin = locked.get(canonicalize_name(needed.name))
            version = str(pin.specifier)[2:] if pin else None
            if version is None or version not in needed.specifier:
                missing.add(f"{name} needs {needed}, pinned {version}")
    assert missing == {"d2lzh needs jupyter, pinned None"}  # of which it imports IPython alone


@pytest.mark.parametrize(
    "command", [["trainer", "train"], ["launch", "local", "-n", "2", "--", "true"]]
)
def test_without_its_packages_a_command_says_how_to_get_them(command):
    """As after a mere `pip install .`; -S keeps Python from its site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "No module named" in line and "make setup" in line


@pytest.mark.parametrize("command", ["trainer train", "launch local -n 2 -- true"])
def test_a_current_folder_that_is_gone_is_reported_in_one_line(tmp_path, command):
    lines = f"cd {tmp_path}; mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m {command}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", lines], stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "current folder was removed" in line
