"""What `pip install .` brings is enough to train and to launch, away from any clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import List

import pytest

from .commands import ROOT

QUICK = [
    *("gluon-train", "train", "quickstart", "data.dataset=fashion_mnist_sample"),
    *("train.max_steps=2", "data.image_size=null"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves folders in its source, and reads old ones there."""
    source, built = tmp_path_factory.mktemp("source") / "clone", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True) if (
        ROOT / ".git"
    ).exists() else ""
    for name in ("trainer", "launch", "configs", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(str(ROOT / name), str(source / name), **({"symlinks": True} if copy is shutil.copytree else {}))
    pip_wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built)]
    subprocess.run([sys.executable, "-m", "pip", *pip_wheel, str(source)], check=True)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel and this one's packages."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    others = Path(sysconfig.get_path("purelib"))
    # Not the clone itself, which is installed there by links in .pth files: those are not read.
    (packages / "others.pth").write_text(f"{others}\n")
    target = ["--python", str(place / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", *target, "--ignore-installed", str(wheel)], check=True)
    return place / "bin"


def run(programs: Path, words: List[str], folder: Path) -> str:
    """What a program says that is typed in ``folder``."""
    environment = {"HOME": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}
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
