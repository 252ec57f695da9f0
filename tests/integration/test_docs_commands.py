"""Runs the commands of README and docs; tests/documented.py maps commands to tests.

Those of benchmarks and make: test_docs_benchmarks.py.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import numpy as np
import pytest
from PIL import Image

from tests.documented import ELSEWHERE, kind_of, lines
from tests.documents import ROOT, blocks, typed
from tests.processor import HAS_BFLOAT16
from trainer.data import fashion_mnist

from .commands import HOROVODRUN, environment, run

SAMPLE = "fashion_mnist_sample"
FEW = f"data.dataset={SAMPLE} train.max_steps=3"
SMALL = f"{FEW} model.factory=tests.integration.nets:small"
# Runs that the pages' commands look at.
TAKEN_FOR_GRANTED = ("quickstart", "fashion_mnist", "fashion_mnist_best")
LEFT = {
    "train configs/quickstart.yaml name=two": "runs/two/checkpoints/step-00000003/model.params",
    "--picture": "answers.png",
    "export": "exported/model.onnx",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the project's own files are where the page says."""
    for name in ("configs", "tests", "trainer"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def shell_environment(project: Path = ROOT) -> Dict[str, str]:
    """What `source .venv/bin/activate` leaves; ``project`` is the one whose modules are taken."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environment(), "PATH": path, "PYTHONPATH": str(project)}


def shell(line: str, folder: Path, project: Path = ROOT) -> str:
    """What a line says that is typed in ``folder``, with the environment activated."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=shell_environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


# One process for commands that need no launcher: each would start for seconds.
IN_TURN = """
import json, sys
from trainer.cli.main import main
for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    main(words, standalone_mode=False)
"""


def in_turn(commands: List[str], folder: Path) -> None:
    """Type lines that begin with `python -m trainer`."""
    words = [shlex.split(line)[3:] for line in commands]
    said = shell(shlex.join(["python", "-c", IN_TURN, json.dumps(words)]), folder)
    assert said.count("$ ") == len(words)


def test_the_quick_start_does_what_it_says(folder: Path) -> None:
    page = [line for line in typed(ROOT / "docs" / "quickstart.md") if " -m " in line]
    assert [word for line in page for word in line.split()].count("train") == 2
    for is_launched, group in itertools.groupby(map(_small, page), lambda line: "launch" in line):
        if is_launched:
            for line in group:
                shell(line, folder)
        else:
            in_turn(list(group), folder)
    for words, path in LEFT.items():
        assert any(words in line for line in page)
        assert (folder / path).is_file()


def test_all_that_train_look_and_launch_run(folder: Path) -> None:
    """Those of all pages, with a small net on the sample."""
    (folder / "photos").mkdir()
    images, _ = fashion_mnist.load("test", None, SAMPLE)
    for path in (folder / "photos" / "coat.png", folder / "shoe.jpg"):
        Image.fromarray(np.kron(images[0], np.ones((3, 3), np.uint8))).save(path)
    (folder / "mypackage").mkdir()
    nets = folder / "mypackage" / "nets.py"
    nets.write_text("from tests.integration.nets import small as make\n")

    def possible(kind: str) -> List[str]:
        return [line for line in lines(kind) if HAS_BFLOAT16 or "bfloat16" not in line]

    alone = [line for line in possible("alone") if "runs/two" not in line]  # of the quick start
    launched = list(dict.fromkeys(re.sub(r" name=\w+", "", line) for line in possible("launched")))
    assert len(alone) >= 15 and len(launched) >= 10
    first = [f"python -m trainer train configs/{name}.yaml" for name in TAKEN_FOR_GRANTED]
    in_turn([_small(line) for line in [*first, *alone]], folder)
    for number, line in enumerate(launched):
        name = "" if " train " not in line else f" name=launched{number}"
        if line.startswith("mpirun"):
            _mpirun(_small(line) + name, folder)
        else:
            # The curves and figures of those alone are enough.
            shell(f"{_small(line)}{name and f'{name} monitor.loggers=[]'}", folder)
            assert not name or list(
                (folder / "runs" / name.split("=")[1]).glob("checkpoints/step*")
            )
    for left in ("answers.png", "exported/model_card.md", "runs/quickstart/calibrated.params"):
        assert (folder / left).is_file()
    assert list((folder / "traces").iterdir())


def _mpirun(line: str, folder: Path) -> None:
    """It trains where Horovod has MPI, and is refused in one line where it has not, as here."""
    if shutil.which("mpirun") is None:
        return
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=shell_environment(), capture_output=True, text=True
    )
    if "[X] MPI" in shell("horovodrun --check-build", folder):
        assert done.returncode == 0, done.stderr
    else:
        assert done.stderr.count("error: 2 processes were started, but Horovod joins only 1") == 1


def _small(line: str) -> str:
    """The line, for a small net (if it or its preset names none) on the sample, and few steps."""
    if " bench " in line:
        return f"{line} --steps 2 --warmup 1 {SMALL}"
    if "model.factory" in line or "train configs/fashion_mnist_best.yaml" in line:
        return f"{line} {FEW}"
    if re.search(" (evaluate|predict|export|calibrate) ", line):
        return f"{line} --trust"
    return f"{line} {SMALL}" if " train " in line else line


def test_the_loop_that_benchmarks_several_settings_runs(folder: Path) -> None:
    (loop,) = (b.text for b in blocks(ROOT / "docs" / "bench.md") if b.text.startswith("for "))
    said = shell(loop.replace("--json", f"--steps 2 --warmup 1 {SMALL} --json"), folder)
    names = [f"bench-{ranks}-{batch}.json" for ranks in (1, 2) for batch in (128, 64)]
    assert [line.split(":")[0] for line in said.splitlines()[-4:]] == names
    found = json.loads((folder / "bench-2-64.json").read_text())
    assert found["config"]["train"]["global_batch_size"] == 64
    assert found["figures"]["ranks"] == 2


def test_the_set_up_commands_succeed(folder: Path) -> None:
    """Nothing is left to install where tests run, so pip says so without an index."""
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("requirements-export.txt",):
        (folder / name).symlink_to(ROOT / name)
    for line in lines("set-up"):
        shell(f"{line} --no-index" if line.startswith("pip") else line, folder)


def test_commands_run_by_other_tests_are_run_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for names in ELSEWHERE.values():
        for name in names:
            assert f"def {name}(" in tests
    assert lines("slurm") and lines("cannot"), "test_slurm.py has the former"
    with pytest.raises(KeyError, match="no test runs 'python -m benchmark.nothing'"):
        kind_of("python -m benchmark.nothing")


@pytest.mark.parametrize("made_before", [False, True])
def test_a_custom_loop_gives_the_same_losses_on_any_number_of_ranks(
    tmp_path: Path, made_before: bool
) -> None:
    """Also where rank 0 has made layers before: its own are dense9, dense10, in another order."""
    code = "\n".join(
        b.text for b in blocks(ROOT / "docs" / "batch_norm.md") if "hvd.init()" in b.text
    )
    if made_before:
        layers = "nn.Dense(1), nn.BatchNorm(), batch_norm.SyncBatchNorm()"
        begun = f"hvd.init()\n_ = [({layers}) for _ in range(9 * (hvd.rank() == 0))]\n"
        code = code.replace("hvd.init()\n", begun).replace(
            "nn.Dense(10)", "nn.Dense(10), nn.Dense(10)"
        )
    script = tmp_path / "own.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    losses = []
    for launcher in ([], [HOROVODRUN, "-np", "3"]):
        done = run([*launcher, sys.executable, str(script)])
        assert done.code == 0, done.out + done.err
        losses.append([float(x) for x in re.findall(r"loss of the last batch (\S+)", done.out)])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-4)
