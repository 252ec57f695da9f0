"""Preparing the run's folder, for new and resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional

import pytest

from trainer.checkpoint import run_folder
from trainer.config import Config
from trainer.errors import ConfigError


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    """Of a run that has left two checkpoints."""
    made = Config(output=str(tmp_path / "runs"), name="run")
    for step in (8, 16):
        (made.checkpoint_folder / f"step-{step:08d}").mkdir(parents=True)
    return made


def take_folder(settings: Config, start: Optional[Path]) -> None:
    """Prepare it, and leave it at once."""
    with run_folder.taken_folder(settings, start):
        pass


def _left(settings: Config) -> List[str]:
    folder = Path(settings.output)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("step-*"))


def test_going_on_from_the_newest_leaves_all_in_place(settings: Config) -> None:
    before = _left(settings)
    take_folder(settings, settings.checkpoint_folder / "step-00000016")
    assert _left(settings) == before


def test_going_on_from_an_older_one_no_newer_one_can_be_taken_for_its_own(settings: Config) -> None:
    """They would count as the newest: kept when the run's own are deleted, and gone on from."""
    for number in (1, 2):
        start = settings.checkpoint_folder / "step-00000008"
        take_folder(settings, start)
        assert f"run/checkpoints/aside.{number}/step-00000016" in _left(settings)
        assert [path.name for path in start.parent.glob("step-*")] == ["step-00000008"]
        (start.parent / "step-00000016").mkdir()


def test_going_on_from_another_runs_checkpoint_begins_a_folder(settings: Config) -> None:
    other = Path(settings.output) / "other" / "checkpoints" / "step-00000004"
    other.mkdir(parents=True)
    take_folder(settings, other)
    kept = [f"run.1/checkpoints/step-{step:08d}" for step in (8, 16)]
    assert _left(settings) == ["other/checkpoints/step-00000004", *kept]


def test_without_room_nothing_is_set_aside(settings: Config) -> None:
    """The file that is in the way stands for a full disk."""
    before = _left(settings)
    (settings.folder.parent / ".run.begun").write_text("")
    with pytest.raises(OSError):
        take_folder(settings, None)
    assert _left(settings) == before


def test_checkpoints_on_another_disk_are_the_runs_own(settings: Config, tmp_path: Path) -> None:
    folder = settings.checkpoint_folder
    folder.rename(tmp_path / "disk")
    folder.symlink_to(tmp_path / "disk")
    take_folder(settings, folder / "step-00000008")
    assert (tmp_path / "disk" / "aside.1" / "step-00000016").is_dir()


def test_links_to_one_folder_are_one_run(settings: Config, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    linked = Config(output=str(tmp_path / "links"), name="link")
    linked.folder.symlink_to(settings.folder)
    refused = pytest.raises(ConfigError, match="another run is using")
    with run_folder.claimed(settings.folder), refused, run_folder.claimed(linked.folder):
        pass
    with run_folder.claimed(linked.folder):
        pass
