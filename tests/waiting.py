"""Waiting for a condition, with a generous timeout on which no test depends."""

from __future__ import annotations

import time
from typing import Any, Callable


def wait_until(
    condition: Callable[[], Any], explain: Callable[[], object], seconds: float = 60
) -> Any:
    """The result of ``condition()`` once it is true; after ``seconds`` fails with ``explain()``."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)
