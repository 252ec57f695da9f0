"""Takes the pictures in docs/: a tab of the real TensorBoard, by headless Chromium.

    python -m docs.screenshot runs docs/tensorboard.png
    python -m docs.screenshot runs docs/graph.png --tab graphs --wait-for "Main Graph"

Needs Debian's packages `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from tests.integration.board import chromium, missing_packages, tensorboard

SETTLE_SECONDS = 4.0
"""Curves are drawn in an animation, which no text announces the end of."""


def main() -> None:
    """Start TensorBoard, wait for it, photograph it, stop it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder of runs")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--tab", default="scalars")
    parser.add_argument("--tags", default="", help="only those that hold this")
    parser.add_argument("--wait-for", default="events", help="text that the tab shows when ready")
    parser.add_argument("--size", default="1400,1000", help="width,height in pixels")
    arguments = parser.parse_args()
    if missing_packages():
        parser.error(f"there is no browser: apt-get install {' '.join(missing_packages())}")
    width, height = map(int, arguments.size.split(","))
    with tensorboard(
        arguments.runs, lambda board: bool(board.get("plugin/scalars/tags"))
    ) as board, chromium(width, height) as browser:
        place = f"#{arguments.tab}&tagFilter={quote(arguments.tags)}&_smoothingWeight=0"
        browser.open(f"{board.address}/?darkMode=false{place}")
        browser.wait_for(arguments.wait_for)
        time.sleep(SETTLE_SECONDS)
        browser.picture(arguments.picture)
    # 128 colours are enough for curves and letters, and make it a third of the size.
    picture = Image.open(arguments.picture).convert("RGB").quantize(128)
    picture.save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
