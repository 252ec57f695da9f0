"""The records of an event file, by TensorBoard's own reader, which checks their checksums."""

from __future__ import annotations

import resource
import signal
import threading
from pathlib import Path
from typing import List

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboardX.summary import scalar

from trainer.report.tensorboard import EventFile


def steps(folder: Path) -> List[int]:
    """Of the points in the folder's only file, after the first record, which has its format."""
    (path,) = folder.iterdir()
    first, *points = EventFileLoader(str(path)).Load()
    assert first.file_version == "brain.Event:2"
    assert all(point.summary.value[0].tag == "loss" for point in points)
    return [point.step for point in points]


def test_points_are_in_the_file_once_flushed_and_no_thread_writes_them(tmp_path: Path) -> None:
    threads = threading.active_count()
    file = EventFile(tmp_path / "new" / "events")
    for step in (1, 2):
        file.summary(scalar("loss", 0.5), step)
    assert not any(path.stat().st_size for path in (tmp_path / "new" / "events").iterdir())
    file.flush()
    assert steps(tmp_path / "new" / "events") == [1, 2]
    assert threading.active_count() == threads
    file.close()


def test_the_reader_sees_a_wrong_checksum(tmp_path: Path) -> None:
    """So that it would tell if tensorboardX computed another one."""
    file = EventFile(tmp_path)
    file.summary(scalar("loss", 0.5), 1)
    file.summary(scalar("loss", 0.5), 2)
    file.close()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert steps(tmp_path) == [1]


def test_a_later_file_is_read_later_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads a folder's files by their names; a clock goes back, a host has another."""
    made: List[Path] = []
    for seconds, host in ((2e9, "b"), (2e9, "a"), (2e9, "a"), (1.9e9, "a"), (1.9e9, "z")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr("time.time_ns", lambda seconds=seconds: int(seconds * 1e9))
        EventFile(tmp_path).close()
        made += set(tmp_path.glob("events.out.tfevents.*")) - set(made)
    assert len(made) == 5 and made == sorted(made)


def test_points_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit of the size of files, within a record, stands for a full disk."""
    file = EventFile(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        for step in range(1, 6):
            file.summary(scalar("loss", 0.5), step)
            file.flush()
        (path,) = tmp_path.iterdir()
        assert path.stat().st_size == 100
        said = capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert said == f"warning: {path} cannot be written (File too large); its points wait for room\n"
    file.flush()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    file.close()
