"""Each tab of the real TensorBoard, in headless Chromium: what is in it, and no error."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, List, Sequence

import mxnet as mx
import pytest
from PIL import Image

from docs import screenshots
from tests.waiting import wait_until
from trainer import config, model

from .board import Browser, TensorBoard, chromium, missing_packages

DOCS = Path(screenshots.__file__).parent

pytestmark = pytest.mark.skipif(
    bool(missing_packages()), reason=f"apt-get install {' '.join(missing_packages())}"
)

BOTH = ("default/events", "two/events")
TABS = {
    "timeseries": [*BOTH, "accuracy", "loss", "optimizer", "per_class", "speed", "system"],
    "scalars": [*BOTH, "tag: accuracy/test", "tag: loss/train", "ranks", "per_class", "speed"],
    "custom_scalars": ["training and test", "ranks", "loss/train (default/events)"],
    "images": ["test/confusion default/events step 48", "test/predictions two/events step 32"],
    "graphs": [*BOTH, "Main Graph", "conv0", "batchnorm0", "dense0"],
    "distributions": ["weight_gradients", "weights/0.weight default/events", "4.bias two/events"],
    "histograms": ["weight_gradients", "weights/0.weight default/events", "4.bias two/events"],
    "text": ["config/text_summary", "global_batch_size: 125", "model/text_summary", "BatchNorm"],
    "pr_curves": ["default/events step 48", "two/events step 32", "tag: test/ankle boot"],
    "hparams": ["Hyperparameters", "optimizer.lr", "accuracy/test", "default/e", "two/e"],
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize(("tab", "words"), TABS.items())
def test_the_tab_opens_and_shows_the_runs(
    board: TensorBoard, browser: Browser, tab: str, words: Sequence[str]
) -> None:
    browser.open(f"{board.address}/#{tab}")
    browser.wait_for(*words)
    assert browser.errors() == []


def test_the_runs_sort_by_their_final_accuracy(board: TensorBoard, browser: Browser) -> None:
    accuracy = {run: board.scalars(run, "accuracy/test")[-1][2] for run in BOTH}
    assert len(set(accuracy.values())) == 2
    browser.open(f"{board.address}/#hparams")
    browser.wait_for(*accuracy)
    headings = [text for text in browser.texts("vaadin-grid-cell-content") if text]
    assert {"batch_norm", "ranks", "train.epochs"} <= set(headings[:7]), "in what they differ"
    browser.click("[label='Sort by']")
    browser.click("paper-item", "accuracy/test")
    for direction, reverse in (("Ascending", False), ("Descending", True), ("Ascending", False)):
        browser.click("[label='Direction']")
        browser.click("paper-item", direction)
        order = sorted(accuracy, key=accuracy.__getitem__, reverse=reverse)
        _wait_for_rows(browser, order)
    assert browser.errors() == []


def _wait_for_rows(browser: Browser, order: List[str]) -> None:
    def rows() -> List[str]:
        return [text for text in browser.texts("vaadin-grid-cell-content") if text in order]

    wait_until(lambda: rows() == order, lambda: f"{rows()} instead of {order}")


@pytest.mark.parametrize("picture", screenshots.PICTURES, ids=lambda picture: picture.file)
def test_the_pictures_of_the_docs_can_be_taken(
    board: TensorBoard, browser: Browser, picture: screenshots.Picture, tmp_path: Path
) -> None:
    """As `python -m docs.screenshots` takes them, of other runs."""
    screenshots.take(picture, board, browser, tmp_path, settle=0)
    with Image.open(tmp_path / picture.file) as taken, Image.open(DOCS / picture.file) as kept:
        assert taken.size == kept.size and len(taken.getcolors()) > 5


def test_the_runs_on_the_pictures_can_be_made(tmp_path: Path) -> None:
    """Their settings are right, and their net is one."""
    for name in screenshots.RUNS:
        command = screenshots.command(name, tmp_path)
        settings = config.load(None, [word for word in command if "=" in word])
        net = model.build(settings.model)
        net.initialize()
        assert net(mx.nd.zeros((2, 1, 28, 28))).shape == (2, 10)


def test_an_error_in_the_page_is_noticed(board: TensorBoard, browser: Browser) -> None:
    browser.open(f"{board.address}/data/nothing")
    assert any("404" in message for message in browser.errors())
