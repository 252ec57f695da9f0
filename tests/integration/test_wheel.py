"""What `pip install .` brings is enough to train and to launch, away from any clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import List

import pytest

from .commands import ROOT

QUICK = ["quickstart", "data.dataset=fashion_mnist_sample", "train.max_steps=2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes into its source, and would read what is left there."""
    source, built = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in ("trainer", "launch", "configs", "tests/sample"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    (source / "configs" / "site.yaml").write_text("partition: ours")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(built), str(source))
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's packages, which go before those of this environment, and bin/."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", str(folder), str(wheel))
    return folder


def pip(action: str, *words: str) -> None:
    command = [sys.executable, "-m", "pip", action, "--quiet", "--no-deps", *words]
    subprocess.run(command, check=True, timeout=240)


def run(installed: Path, folder: Path, *words: str) -> str:
    """What a command says that is typed in ``folder``."""
    environment = {
        "HOME": str(folder),
        "PATH": f"{installed / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(installed),
    }
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_preset_by_its_name_trains_on_one_process_and_on_two_ranks(
    installed: Path, tmp_path: Path
) -> None:
    here = "import trainer, launch; print(trainer.__file__, launch.__file__)"
    for place in run(installed, tmp_path, sys.executable, "-c", here).split():
        assert place.startswith(str(installed)), "the clone's own must not be what is tried"
    alone = run(installed, tmp_path, "gluon-train", "train", *QUICK, "output=alone")
    assert "alone/quickstart: 2000 training and 500 test images" in alone
    ranks = ["gluon-launch", "local", "-n", "2", "--quiet", "--", "gluon-train", "train"]
    assert "2 ranks on " in run(installed, tmp_path, *ranks, *QUICK, "output=two")
    for output in ("alone", "two"):
        assert list((tmp_path / output / "quickstart" / "checkpoints").glob("step-*2"))


@pytest.mark.parametrize("program", ["gluon-train", "gluon-launch"])
def test_the_programs_say_their_version(
    wheel: Path, installed: Path, tmp_path: Path, program: str
) -> None:
    version = wheel.name.split("-")[1]
    assert run(installed, tmp_path, program, "--version") == f"gluon-horovod-trainer {version}\n"
    # As after `python -m`: a lost answer is 2, and not 120 from Python's last flush.
    lost = f"{program} --version > /dev/full; [ $? = 2 ] && {program} --version | true"
    said = run(installed, tmp_path, "bash", "-c", lost)
    assert said == "error: the standard output cannot be written: No space left on device\n"


def test_the_wheel_holds_all_that_is_needed_and_nothing_of_a_site(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (
        *(("trainer", "*.py"), ("launch", "*.py"), ("trainer/native", "*.cc")),
        *(("trainer/native", "*.h"), ("trainer/data/sample", "*.gz")),
    ):
        found: List[Path] = sorted((ROOT / folder).rglob(pattern))
        assert found and {str(path.relative_to(ROOT)) for path in found} <= names
    assert {"trainer/py.typed", "launch/py.typed"} <= names
    presets = {name for name in names if name.endswith(".yaml")}
    assert presets == {
        f"trainer/config/presets/{path.name}"
        for path in (ROOT / "configs").glob("*.yaml")
        if not path.name.startswith("site")
    }
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "build"))]
