"""Runs the benchmarks and the goals of make that README and docs have, scaled down, in a copy."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.documented import lines
from tests.documents import ROOT
from trainer.data import fashion_mnist

from . import hosts
from .test_docs_commands import FEW, SMALL, shell

# What each measures at the least; scaling_validation predicts anew what was measured before. They
# write into docs/ and results/, so into those of a copy.
LEAST = {
    "accuracy_choices": f"--only 'width 8' --epochs 1 {FEW}",
    "batch_norm": "--rounds 1 --batch 2 --forms hybridized",
    "channel": "",
    "fuzz": "--inputs 60",
    "invariance": "--steps 1 --ranks 1",
    "layer_times": "--rounds 1 --images 1",
    "loader": "--rounds 1 --images 128 --pictures 192 --records 1000",
    "monitor": "--batch 32 --blocks 1 --steps 1",
    "mutants": "launch/slurm/requeue.py --first 2",
    "record_run": "--picture curve.png runs/kept typed by a test",
    "scaling": "",
    "scaling_validation": "--rates ''",
    "step_choices": "--only bucket_mb=100 --rounds 1 --steps 1",
    "update": "--rounds 1",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files, and a finished run."""
    place = tmp_path_factory.mktemp("copy") / "project"
    unwanted = shutil.ignore_patterns(".*", "runs", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, place, ignore=unwanted)
    shell(f"python -m trainer train {SMALL} name=kept", place, place)
    return place


@pytest.mark.parametrize("line", lines("benchmark"))
def test_benchmarks_run_and_keep_what_they_measure(line: str, copy: Path) -> None:
    (name,) = re.findall(r"benchmarks\.(\w+)", line)
    if name in ("scaling_validation", "channel") and hosts.why_not() is not None:
        pytest.skip(str(hosts.why_not()))
    if name in ("loader", "step_choices") and not fashion_mnist.DEBIAN_FOLDER.is_dir():
        pytest.skip("it reads the whole set: apt-get install dataset-fashion-mnist")
    kept = copy / "benchmarks" / "results" / f"{'kept' if name == 'record_run' else name}.json"
    before = kept.stat().st_mtime_ns if kept.exists() else 0
    shell(f"{line} {LEAST[name]}", copy, copy)
    assert kept.stat().st_mtime_ns > before
    assert json.loads(kept.read_text())["figures"]


# PYTHON is what sets up, which nothing is left for here: continuous integration has `make` do that.
NOTHING_SAID = r"^(make.*\n)*$"  # nothing but make's own words: install.py has tests of its own
LEAST_OF_MAKE = {
    "train": f'RANKS=2 ARGS="{SMALL}"',
    "test": 'ARGS="-n 0 tests/unit/data/test_sharding.py"',
    "chaos": "TRIALS=1",
    "bench": 'ARGS="--only first_step --rounds 1"',
    "prove-gpu": "ARGS=--help",  # all of it takes root, 4 GB and 20 minutes
    "setup": "",
    "data": "",
}


@pytest.mark.parametrize("line", lines("make"))
def test_make_does_what_it_says(line: str, copy: Path) -> None:
    if not (copy / ".venv").exists():
        (copy / ".venv").symlink_to(sys.prefix)
    goal = line.split()[1]
    if goal == "bench" and not fashion_mnist.DEBIAN_FOLDER.is_dir():
        pytest.skip("it reads the whole set: apt-get install dataset-fashion-mnist")
    said = shell(f"{line} PYTHON=true {LEAST_OF_MAKE[goal]}", copy, copy)
    written = {
        "train": r"done: test accuracy 0\.\d+ .*\n.*runs/quickstart/checkpoints/step-00000003",
        "test": r"\d+ passed",
        "chaos": r"trials: 1\n",
        "bench": r"first_step, round 1, Horovod \+ Gluon: {.*'first_step': ",
        "prove-gpu": r"usage: prove_gpu\.py",
        "setup": NOTHING_SAID,
        "data": NOTHING_SAID,
    }
    assert re.search(written[goal], said), said
    if goal == "chaos":
        record = json.loads((copy / "benchmarks" / "results" / "chaos.json").read_text())
        assert "--trials 1 " in record["command"]
