"""Features of the CPU that tests depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

HAS_BFLOAT16 = "avx512bw" in Path("/proc/cpuinfo").read_text()

needs_bfloat16 = pytest.mark.skipif(
    not HAS_BFLOAT16, reason="oneDNN has no products in bfloat16 for a processor without AVX-512"
)
