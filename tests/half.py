"""Training in float16 on CPUs, for which MXNet has no kernels of it.

The stand-in multiplies in float32 what has been rounded to float16, and rounds what comes out, in
forward and backward, as on GPUs: numbers above 65,504 are infinite.
"""

from __future__ import annotations

from typing import Any

import pytest

from trainer.model import mixed_precision


def allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``train.precision: float16`` work on CPUs in the rest of a test."""

    def product(precision: str, F: Any, operator: Any, *operands: Any, **options: Any) -> Any:
        rounded = [x if x is None else F.identity(_rounded(F, F.identity(x))) for x in operands]
        return _rounded(F, operator(*rounded, **options))

    monkeypatch.setattr(mixed_precision, "_product", product)
    monkeypatch.setitem(mixed_precision._DEVICES, "float16", "cpu")


def _rounded(F: Any, array: Any) -> Any:
    return F.amp_cast(F.amp_cast(array, dtype="float16"), dtype="float32")
