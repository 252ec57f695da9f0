"""What the documents have the reader type: the quick start, line by line, and a script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, typed

from .commands import HOROVODRUN, environment, run

SMALL = (
    "data.dataset=fashion_mnist_sample model.factory=tests.integration.nets:small train.max_steps=3"
)
# What the unit tests or other commands here cover, or what would install packages or never end.
ELSEWHERE = ("make", "source", "pip", "tensorboard", "jupyter")

LEFT = {
    "train configs/quickstart.yaml name=two": "runs/two/checkpoints/step-00000003/model.params",
    "--picture": "answers.png",
    "export": "exported/model.onnx",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the project's own files are where the page says."""
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_quick_start_does_what_it_says(folder: Path) -> None:
    lines = [line for line in typed(ROOT / "docs" / "quickstart.md") if _run_here(line)]
    assert [word for line in lines for word in line.split()].count("train") == 2
    for line in lines:
        small = f"{line} {SMALL}" if " train " in line else line
        done = subprocess.run(
            ["bash", "-c", small],
            cwd=folder,
            env={
                **environment(),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{small}\n{done.stdout}"
    for words, path in LEFT.items():
        assert any(words in line for line in lines)
        assert (folder / path).is_file()


def _run_here(line: str) -> bool:
    return line.split()[0] not in ELSEWHERE


def test_a_loop_of_ones_own_gives_the_same_losses_on_any_number_of_ranks(tmp_path: Path) -> None:
    code = [b.text for b in blocks(ROOT / "docs" / "batch_norm.md") if "hvd.init()" in b.text]
    script = tmp_path / "own.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(code))
    losses = []
    for launcher in ([], [HOROVODRUN, "-np", "3"]):
        done = run([*launcher, sys.executable, str(script)])
        assert done.code == 0, done.out + done.err
        losses.append([float(x) for x in re.findall(r"loss of the last batch (\S+)", done.out)])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-4)
