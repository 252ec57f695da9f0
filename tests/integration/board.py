"""The real TensorBoard in headless Chromium; docs/screenshots.py uses them too."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, Iterator, List

from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException

PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}  # and their packages
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

# Most of TensorBoard lies in shadow roots, which document.body.innerText does not enter.
_TEXT = """
const hidden = ['STYLE', 'SCRIPT', 'NOSCRIPT', 'TEMPLATE'];
function text(node) {
    if (node.nodeType === Node.TEXT_NODE) return node.textContent;
    if (hidden.includes(node.nodeName)) return '';
    const roots = node.shadowRoot ? [node.shadowRoot, node] : [node];
    return roots.flatMap(root => [...root.childNodes].map(text)).join(' ');
}
return text(document.body).replace(/\\s+/g, ' ');
"""


# The elements that a selector fits and that are seen, with their texts, from top to bottom; shadow
# roots included.
_SEEN = """
function found(root) {
    return [...root.querySelectorAll('*')].flatMap(element => [
        ...(element.matches(selector) ? [element] : []),
        ...(element.shadowRoot ? found(element.shadowRoot) : []),
    ]);
}
const selector = arguments[0];
const top = element => element.getBoundingClientRect().top;
const seen = found(document).filter(element => element.getClientRects().length);
return seen.sort((a, b) => top(a) - top(b)).map(element => [element, element.textContent.trim()]);
"""


class TensorBoard:
    """A running TensorBoard."""

    def __init__(self, address: str):
        self.address = address

    def get(self, path: str, **query: str) -> Any:
        """What it answers, from JSON."""
        url = f"{self.address}/data/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.loads(answer.read())

    def scalars(self, run: str, tag: str) -> list:
        """[wall time, step, value] of each point."""
        return self.get("plugin/scalars/scalars", run=run, tag=tag)


@contextlib.contextmanager
def tensorboard(
    folder: Path, ready: Callable[[TensorBoard], bool], seconds: float = 90
) -> Iterator[TensorBoard]:
    """TensorBoard on ``folder``, once it is ``ready``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", folder.name),
            *("--host", "127.0.0.1", "--port", str(port), "--load_fast=false"),
        ],
        cwd=folder.parent,  # it shows what it was given
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        board = TensorBoard(f"http://127.0.0.1:{port}")
        until = time.monotonic() + seconds
        while not _is(ready, board):
            assert server.poll() is None, "TensorBoard has ended"
            assert time.monotonic() < until, f"TensorBoard is not ready after {seconds} s"
            time.sleep(0.3)
        yield board
    finally:
        server.terminate()
        server.wait(20)


def _is(ready: Callable[[TensorBoard], bool], board: TensorBoard) -> bool:
    try:
        return ready(board)
    except OSError:  # it does not listen yet
        return False


class Browser:
    """Headless Chromium."""

    def __init__(self, driver: webdriver.Chrome):
        self._driver = driver

    def resize(self, width: int, height: int) -> None:
        """Give the window that many pixels."""
        self._driver.set_window_rect(width=width, height=height)

    def open(self, address: str) -> None:
        """Load a page anew, although only what follows its # may differ."""
        self._driver.get("about:blank")
        self._driver.get(address)

    def text(self) -> str:
        """The page's text, in one line."""
        return self._driver.execute_script(_TEXT)

    def wait_for(self, *words: str, seconds: float = 60) -> str:
        """The page's text once all ``words`` are in it."""
        until = time.monotonic() + seconds
        while True:
            text = self.text()
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            assert time.monotonic() < until, f"{missing} not in the page: {text}"
            time.sleep(0.2)

    def texts(self, selector: str) -> List[str]:
        """What stands in the elements that a CSS selector fits, from top to bottom."""
        return [text for _, text in self._driver.execute_script(_SEEN, selector)]

    def click(self, selector: str, text: str = "", seconds: float = 20) -> None:
        """Click the element that a CSS selector fits and that has just this ``text``, if given."""
        until = time.monotonic() + seconds
        while True:
            seen = self._driver.execute_script(_SEEN, selector)
            fitting = [element for element, held in seen if text in ("", held)]
            if len(fitting) == 1:
                self._driver.execute_script(
                    "arguments[0].scrollIntoView({block: 'center'})", fitting[0]
                )
                # Until a menu has slid away it may lie above.
                with contextlib.suppress(ElementClickInterceptedException):
                    fitting[0].click()
                    return
            assert time.monotonic() < until, f"{len(fitting)} of {selector} {text} to click"
            time.sleep(0.2)

    def errors(self) -> List[str]:
        """What went to the console as an error since the last call."""
        log = self._driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        self._driver.save_screenshot(str(path))


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """A browser with a window of that many pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_window_rect(width=width, height=height)
        yield Browser(driver)
    finally:
        driver.quit()


def missing_packages() -> List[str]:
    """The Debian packages without which there is no browser."""
    return [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
