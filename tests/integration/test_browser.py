"""Each tab of the real TensorBoard, in headless Chromium: what is in it, and no error."""

from __future__ import annotations

from typing import Iterator, Sequence

import pytest

from .board import Browser, TensorBoard, chromium, missing_packages

pytestmark = pytest.mark.skipif(
    bool(missing_packages()), reason=f"apt-get install {' '.join(missing_packages())}"
)

BOTH = ("default/events", "two/events")
TABS = {
    "timeseries": [*BOTH, "batch_norm", "class", "epoch", "speed", "system", "train", "/drift"],
    "scalars": [*BOTH, "tag: batch_norm/drift", "tag: class/bag", "speed", "system", "train"],
    "custom_scalars": ["training and test", "ranks", "train/loss (default/events)"],
    "images": ["test/confusion default/events step 48", "test/predictions two/events step 32"],
    "graphs": [*BOTH, "Main Graph", "conv0", "batchnorm0", "dense0"],
    "distributions": ["gradients", "conv0_weight default/events", "dense0_bias two/events"],
    "histograms": ["gradients", "conv0_weight default/events", "dense0_bias two/events"],
    "text": ["config/text_summary", "global_batch_size: 125", "model/text_summary", "BatchNorm"],
    "pr_curves": ["default/events step 48", "two/events step 32", "tag: test/ankle boot"],
    "hparams": ["Hyperparameters", "optimizer.lr", "final/accuracy", "default/e", "two/e"],
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
