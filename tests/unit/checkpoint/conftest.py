"""What the tests of checkpoints start from."""

from __future__ import annotations

import pytest

from .runs import Run


@pytest.fixture(scope="module")
def trained():
    return Run().train(0, 3)


@pytest.fixture
def two(tmp_path, trained):
    return trained.save(tmp_path, 1, 0.5), trained.save(tmp_path, 2, 0.6)
