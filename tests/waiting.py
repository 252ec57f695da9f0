"""Waiting for what must happen soon; no test depends on how soon."""

from __future__ import annotations

import time
from typing import Any, Callable


def wait_until(
    is_so: Callable[[], Any], otherwise: Callable[[], object], seconds: float = 60
) -> Any:
    """What ``is_so()`` gives, once that is true; fails after ``seconds``, and ``otherwise()`` says
    why."""
    deadline = time.monotonic() + seconds
    while True:
        found = is_so()
        if found:
            return found
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)
