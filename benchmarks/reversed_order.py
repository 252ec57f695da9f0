"""``python -m trainer`` with each global batch in the opposite order; see invariance.py."""

from __future__ import annotations

import numpy as np

from trainer.data import sharding

_in_order = sharding.global_batch


def _reversed(order: np.ndarray, global_batch_size: int, batch: int) -> np.ndarray:
    return _in_order(order, global_batch_size, batch)[::-1].copy()


if __name__ == "__main__":
    sharding.global_batch = _reversed
    from trainer.cli.main import run

    run()
