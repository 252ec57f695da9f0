"""A run's folder: prepared for new and resumed runs; its checkpoints found, kept and named."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import List, Optional

import pytest

from trainer import checkpoint
from trainer.checkpoint import find_best, find_latest, listing, problem, run_folder
from trainer.config import Config, Optimizer
from trainer.errors import ConfigError

from .runs import FILES, names


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


# ---------------------------------------------------------------- keeping


def test_newest_are_kept(tmp_path, trained):
    for step in range(1, 6):
        assert trained.save(tmp_path, step, keep=2).name == f"step-{step:08d}"
    assert names(tmp_path) == ["04", "05"]
    assert sorted(p.name for p in listing(tmp_path)[0].iterdir()) == FILES


def test_best_is_kept_besides_the_newest(tmp_path, trained):
    for step, accuracy in enumerate([0.5, 0.9, None, 0.7, None, 0.8], start=1):
        trained.save(tmp_path, step, accuracy, keep=2)
    assert names(tmp_path) == ["02", "05", "06"]
    assert find_best(tmp_path).name == "step-00000002"
    trained.save(tmp_path, 7, 0.9, keep=2)  # as good, and newer
    assert find_best(tmp_path).name == "step-00000007"
    assert names(tmp_path) == ["06", "07"]


def test_nothing_to_find(tmp_path):
    assert find_latest(tmp_path, print) is None
    assert find_latest(tmp_path / "absent", print) is None
    assert find_best(tmp_path) is None
    assert listing(tmp_path / "absent") == []


def test_steps_are_ordered_as_numbers(tmp_path, trained):
    for step in (9, 100, 1_000_000, 99_999_999):
        trained.save(tmp_path, step, keep=9)
    steps = [checkpoint.read_state(path).step for path in listing(tmp_path)]
    assert steps == [9, 100, 1_000_000, 99_999_999]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "swapped", "folder"])
def test_damaged_file_is_named_and_the_checkpoint_before_is_taken(two, file, damage):
    old, new = two
    path = new / file
    if damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        content = path.read_bytes()
        other = (new / ("state.json" if file != "state.json" else "model.params")).read_bytes()
        path.write_bytes(
            {"empty": b"", "truncated": content[:-9], "longer": content + b"}", "swapped": other}[
                damage
            ]
        )
    assert str(new) in problem(new) and "\n" not in problem(new)
    reports = []
    assert find_latest(new.parent, reports.append) == old
    (report,) = reports
    assert str(new) in report and "\n" not in report
    if file != "manifest.json":
        assert file in report


def test_all_damaged(two):
    for path in two:
        (path / "model.params").write_bytes(b"")
    reports = []
    assert find_latest(two[0].parent, reports.append) is None
    assert len(reports) == 2


def test_strange_files_between_checkpoints_are_passed_over(two):
    _, new = two
    folder = new.parent
    (folder / "step-00000009").write_text("a file")
    (folder / "step-00000008").mkdir()
    (folder / "step-1x").symlink_to("nowhere")
    (folder / "notes.txt").write_text("mine")
    reports = []
    assert find_latest(folder, reports.append) == new
    assert len(reports) == 3
    assert find_best(folder) == new


@pytest.mark.parametrize(
    "state", ["[]", "null", "3", '{"accuracy": "high"}', '{"accuracy": []}', "{", ""]
)
def test_strange_state_does_not_stop_a_save(two, trained, state):
    old, _ = two
    (old / "state.json").write_text(state)
    trained.save(old.parent, 3, 0.1, keep=3)
    assert find_best(old.parent).name == "step-00000002"


# ---------------------------------------------------------------- names


def test_a_run_of_other_settings_has_the_next_free_number(tmp_path):
    def settings(lr: float) -> Config:
        return Config(output=str(tmp_path), name="mine", optimizer=Optimizer(lr=lr))

    for lr, name in ((0.1, "mine"), (0.2, "mine-2"), (0.3, "mine-3"), (0.2, "mine-2")):
        named = run_folder.numbered(settings(lr))
        assert named.name == name
        with run_folder.taken_folder(named, None):
            pass
    (tmp_path / "mine" / "config.yaml").write_text("seed: [")
    assert run_folder.numbered(settings(0.1)).name == "mine-4"


def test_of_two_launches_at_once_the_second_takes_the_next_number(tmp_path, capsys):
    def settings(lr: float) -> Config:
        return Config(output=str(tmp_path), name="mine", optimizer=Optimizer(lr=lr))

    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        run_folder.take(settings(0.1), None, settings(0.1), first)
        named = run_folder.take(settings(0.2), None, settings(0.2), second)
        assert named.name == "mine-2"
        assert "(optimizer.lr: 0.1 -> 0.2); this run is " in capsys.readouterr().err
        with pytest.raises(ConfigError, match="another run is using"):
            run_folder.take(settings(0.1), None, settings(0.1), second)
        with pytest.raises(ConfigError, match="another run is using"):
            run_folder.take(settings(0.3), None, None, second)
