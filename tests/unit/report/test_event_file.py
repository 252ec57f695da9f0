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


def test_files_of_the_same_second_have_names_of_their_own(tmp_path: Path) -> None:
    for _ in range(3):
        EventFile(tmp_path).close()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 3


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
