"""Locks on files between processes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from trainer.dist import file_lock


def test_one_at_a_time_and_free_after(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock.held(path):
        with pytest.raises(TimeoutError), file_lock.held(path, 0.2):
            pass
        child = os.fork()  # as readers of data are, which may outlive the block
        if child == 0:
            os.read(os.pipe()[0], 1)
    try:
        with file_lock.held(path):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_planted_link_empties_no_file(tmp_path: Path) -> None:
    secret, lock = tmp_path / "secret", tmp_path / "lock"
    secret.write_text("of another user")
    lock.symlink_to(secret)
    with pytest.raises(OSError) as error, file_lock.held(lock):
        pass
    assert error.value.errno == errno.ELOOP and str(lock) in str(error.value)
    assert secret.read_text() == "of another user"


def test_errors_other_than_missing_locks_are_raised(tmp_path: Path, monkeypatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), file_lock.held(tmp_path / "lock"):
        pass
