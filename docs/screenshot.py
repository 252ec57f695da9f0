"""Takes docs/tensorboard.png: a run's page in the real TensorBoard, by headless Chromium.

    python docs/screenshot.py runs/fashion_mnist docs/tensorboard.png

Needs Debian's package `chromium`.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from urllib.parse import quote

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def main() -> None:
    """Start TensorBoard, wait for it, photograph it, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("picture", help="the PNG to write")
    parser.add_argument("--tab", default="scalars")
    parser.add_argument("--tags", default="", help="only those that hold this")
    parser.add_argument("--size", default="1400,1000", help="width,height in pixels")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("there is no chromium: apt-get install chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", arguments.run),
            *("--host", "127.0.0.1", "--port", str(port), "--load_fast=false"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(address)
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [
                    *(chromium, *FLAGS, f"--user-data-dir={profile}"),
                    *("--virtual-time-budget=30000", f"--window-size={arguments.size}"),
                    f"--screenshot={arguments.picture}",
                    f"{address}?darkMode=false#{arguments.tab}&tagFilter={quote(arguments.tags)}",
                ],
                check=True,
                stderr=subprocess.DEVNULL,
                timeout=120,
            )
    finally:
        server.terminate()


def _wait(address: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{address}data/runs", timeout=5) as answer:
                if answer.read() != b"[]":
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit("TensorBoard shows no run")


if __name__ == "__main__":
    main()
