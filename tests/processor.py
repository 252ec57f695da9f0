"""Features of the CPU that tests depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

needs_bfloat16 = pytest.mark.skipif(
    "avx512bw" not in Path("/proc/cpuinfo").read_text(),
    reason="oneDNN has no products in bfloat16 for a processor without AVX-512",
)
