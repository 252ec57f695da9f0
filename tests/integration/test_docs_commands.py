"""What the documents have the reader type: the quick start, line by line, a script, and the rest.

Lines that need what a test cannot have (a cluster, a container, an hour) are read by the parsers in
tests/unit/test_docs_commands.py; the launchers' own tests run their like.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.documents import ROOT, blocks, typed
from trainer import fashion_mnist

from .commands import HOROVODRUN, environment, run

SAMPLE = "fashion_mnist_sample"
FEW = f"data.dataset={SAMPLE} train.max_steps=3"
SMALL = f"{FEW} model.factory=tests.integration.nets:small"
PAGES = ("bench", "monitoring", "take_home")
TAKEN_FOR_GRANTED = ("quickstart", "fashion_mnist")  # runs that the pages' commands look at
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


def shell(line: str, folder: Path) -> str:
    """What a line says that is typed in ``folder``, with the environment activated."""
    done = subprocess.run(
        ["bash", "-c", line],
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
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


def test_the_quick_start_does_what_it_says(folder: Path) -> None:
    lines = [line for line in typed(ROOT / "docs" / "quickstart.md") if _run_here(line)]
    assert [word for line in lines for word in line.split()].count("train") == 2
    for line in lines:
        shell(f"{line} {SMALL}" if " train " in line else line, folder)
    for words, path in LEFT.items():
        assert any(words in line for line in lines)
        assert (folder / path).is_file()


# One process for all of a page's commands that need no launcher: each would start for seconds.
IN_TURN = """
import json, sys
from trainer.__main__ import main
for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    main(words, standalone_mode=False)
"""


def test_the_commands_of_other_pages_run(folder: Path) -> None:
    """README's, monitoring's, take_home's and bench's, with a small net on the sample."""
    (folder / "photos").mkdir()
    images, _ = fashion_mnist.load("test", None, SAMPLE)
    for path in (folder / "photos" / "coat.png", folder / "shoe.jpg"):
        Image.fromarray(np.kron(images[0], np.ones((3, 3), np.uint8))).save(path)
    (folder / "mypackage").mkdir()
    nets = folder / "mypackage" / "nets.py"
    nets.write_text("from tests.integration.nets import small as make\n")

    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
    lines = dict.fromkeys(line for page in pages for line in typed(page) if _run_here(line))
    alone = [line for line in lines if line.startswith("python -m trainer")]
    launched = [line for line in lines if line not in alone]
    assert len(alone) >= 12 and len(launched) >= 6
    first = [f"python -m trainer train configs/{name}.yaml" for name in TAKEN_FOR_GRANTED]
    words = [shlex.split(_small(line))[3:] for line in [*first, *alone]]
    said = shell(shlex.join(["python", "-c", IN_TURN, json.dumps(words)]), folder)
    assert said.count("$ ") == len(words)
    for line in launched:
        shell(_small(line), folder)
    for left in ("answers.png", "exported/model_card.md", "runs/quickstart/calibrated.params"):
        assert (folder / left).is_file()
    assert list((folder / "traces").iterdir())


def _small(line: str) -> str:
    """The line, for a small net (if it names none) on the sample, and few steps."""
    if " bench " in line:
        return f"{line} --steps 2 --warmup 1 {SMALL}"
    if "model.factory" in line:
        return f"{line} {FEW}"
    return f"{line} {SMALL}" if " train " in line else line


def _run_here(line: str) -> bool:
    return line.split()[0] not in ELSEWHERE and "--sweep" not in line  # test_bench.py sweeps


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
