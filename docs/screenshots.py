"""Makes the pictures of TensorBoard in docs/: the runs on them, then headless Chromium.

    python -m docs.screenshots [--runs FOLDER]

Three runs of the book's LeNet with batch norm (its section 5.10) on two ranks, on the sample of
2,000 images: a few minutes in all. Those that are finished in FOLDER already are not made again.
Needs Debian's packages `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from mxnet.gluon import nn
from PIL import Image

from tests.integration.board import Browser, TensorBoard, chromium, missing_packages, tensorboard

DOCS = Path(__file__).parent
RUNS: Dict[str, Tuple[str, ...]] = {
    "lr-0.1": ("optimizer.lr=0.1",),
    "lr-1.0": ("optimizer.lr=1.0",),
    "lr-1.0-sync": ("optimizer.lr=1.0", "batch_norm=sync"),
}
SETTINGS = (
    "model.factory=docs.screenshots:lenet",
    "data.dataset=fashion_mnist_sample",
    "train.epochs=16",
    "train.global_batch_size=50",
)
COLOURS = 128  # enough for curves and letters, at a third of the size


class Picture(NamedTuple):
    """A tab of TensorBoard, as it stands in the docs."""

    file: str
    tab: str
    words: Tuple[str, ...]  # that it shows when it is ready
    size: Tuple[int, int]  # of the window, in pixels
    tags: str = ""  # a regular expression, escaped for an address: those that are shown


PICTURES = (
    Picture("tensorboard.png", "scalars", ("accuracy/test",), (1000, 840), "/(test%7Ctrain)%24"),
    Picture(
        "tensorboard_images.png", "images", ("test/confusion", "test/predictions"), (1100, 1130)
    ),
    Picture("tensorboard_hparams.png", "hparams", ("optimizer.lr", "accuracy/test"), (1700, 480)),
)


def lenet() -> nn.HybridSequential:
    """The net of the book's section 5.10."""
    net = nn.HybridSequential()
    for channels in (6, 16):
        net.add(nn.Conv2D(channels, kernel_size=5), nn.BatchNorm(), nn.Activation("sigmoid"))
        net.add(nn.MaxPool2D(pool_size=2, strides=2))
    for units in (120, 84):
        net.add(nn.Dense(units), nn.BatchNorm(), nn.Activation("sigmoid"))
    net.add(nn.Dense(10))
    return net


def command(name: str, runs: Path) -> List[str]:
    """What trains the run of that name."""
    launcher = [sys.executable, "-m", "launch", "local", "-n", "2", "--quiet", "--"]
    train = [sys.executable, "-m", "trainer", "train", *SETTINGS, *RUNS[name]]
    return [*launcher, *train, f"output={runs}", f"name={name}"]


def take(
    picture: Picture, board: TensorBoard, browser: Browser, folder: Path, settle: float
) -> None:
    """Write the picture into ``folder``.

    Args:
        settle: seconds for curves to be drawn in an animation, which no text tells the end of.
    """
    browser.resize(*picture.size)
    place = f"#{picture.tab}&tagFilter={picture.tags}&_smoothingWeight=0"
    browser.open(f"{board.address}/?darkMode=false{place}")
    browser.wait_for(*picture.words)
    time.sleep(settle)
    path = folder / picture.file
    browser.picture(path)
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    """Train, start TensorBoard, photograph it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="where the runs are kept; default: nowhere")
    asked = parser.parse_args()
    if missing_packages():
        parser.error(f"there is no browser: apt-get install {' '.join(missing_packages())}")
    with tempfile.TemporaryDirectory() as temporary:
        runs = asked.runs or Path(temporary, "runs")
        for name in RUNS:
            subprocess.run(command(name, runs), check=True)
        with tensorboard(runs, _has_read_all) as board, chromium() as browser:
            for picture in PICTURES:
                take(picture, board, browser, DOCS, settle=4)


def _has_read_all(board: TensorBoard) -> bool:
    tags = board.get("plugin/scalars/tags")
    return all("accuracy/test" in tags.get(f"{name}/events", {}) for name in RUNS)


if __name__ == "__main__":
    main()
