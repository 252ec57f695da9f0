"""A run's folder: prepared for new and resumed runs; its checkpoints found, kept and named."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest

from trainer import checkpoint
from trainer.checkpoint import find_best, find_latest, listing, problem, resume, run_folder
from trainer.config import Config, Optimizer, as_yaml
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
    (folder / "step-10").symlink_to("nowhere")
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


def test_a_launch_that_waits_for_a_config_tries_for_a_second(tmp_path, monkeypatch):
    """Another launch has the lock of the folder, and has not written its config yet."""
    settings = Config(output=str(tmp_path), name="mine")
    waited = []
    monkeypatch.setattr(run_folder.time, "sleep", waited.append)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder.claimed(settings.folder))
        stack.enter_context(pytest.raises(run_folder.InUseError))
        run_folder.take(settings, None, settings, stack)
    assert waited == [0.1] * 9


def test_a_new_run_has_a_folder_for_checkpoints_and_its_config(tmp_path):
    settings = Config(output=str(tmp_path / "deep" / "runs"), name="mine")
    take_folder(settings, None)
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    run = ["deep/runs/mine/checkpoints", "deep/runs/mine/config.yaml"]
    assert made == ["deep", "deep/runs", "deep/runs/.mine.lock", "deep/runs/mine", *run]
    assert (settings.folder / "config.yaml").read_text() == as_yaml(settings)


def test_a_folder_in_use_is_told_with_the_way_out(settings):
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_folder.claimed(settings.folder))
        with pytest.raises(run_folder.InUseError) as error:
            stack.enter_context(run_folder.claimed(settings.folder))
    assert str(error.value) == (
        f"another run is using {settings.folder}; give this one another name=... (ranks of one run "
        "must be started by horovodrun or `python -m launch`)"
    )


def test_the_first_three_settings_that_differ_are_told(tmp_path, capsys):
    unnamed = Config(output=str(tmp_path), name="mine")
    take_folder(unnamed, None)
    other = dataclasses.replace(
        unnamed, seed=7, batch_norm="sync", calibrate_samples=5, optimizer=Optimizer(lr=0.7)
    )
    first_three = "; ".join(run_folder.changed(other)[:3])
    assert len(run_folder.changed(other)) == 4
    with contextlib.ExitStack() as stack:
        run_folder.take(other, None, other, stack)
    assert capsys.readouterr().err == (
        f"{unnamed.folder} was made with other settings ({first_three}); this run is "
        f"{unnamed.folder}-2\n"
    )


def test_a_run_that_goes_on_keeps_its_name(tmp_path, capsys):
    settings = Config(output=str(tmp_path), name="mine")
    with contextlib.ExitStack() as first:
        run_folder.take(settings, None, settings, first)
    start = settings.checkpoint_folder / "step-00000008"
    start.mkdir()
    with contextlib.ExitStack() as second:
        assert run_folder.take(settings, start, settings, second) == settings
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- its config


def test_a_config_that_cannot_be_read_is_one_of_another_run(settings):
    assert run_folder.changed(settings) == []
    (settings.folder / "config.yaml").write_text("seed: [")
    (why,) = run_folder.changed(settings)
    assert "config.yaml" in why


def test_a_config_that_is_there_already_is_not_written_again(settings):
    take_folder(settings, settings.checkpoint_folder / "step-00000016")
    path = settings.folder / "config.yaml"
    assert path.read_text() == as_yaml(settings)
    written = path.stat().st_ino
    take_folder(settings, settings.checkpoint_folder / "step-00000016")
    assert path.stat().st_ino == written
    path.write_bytes(b"\xff")
    take_folder(settings, settings.checkpoint_folder / "step-00000016")
    assert path.read_text() == as_yaml(settings)


def test_a_folder_that_was_removed_is_made_again_with_its_config(settings):
    (settings.folder / "config.yaml").write_text("kept")
    assert run_folder.remade(settings) is False
    assert (settings.folder / "config.yaml").read_text() == "kept"
    settings.folder.rename(settings.folder.with_name("away"))
    assert run_folder.remade(settings) is True
    assert (settings.folder / "config.yaml").read_text() == as_yaml(settings)
    assert settings.checkpoint_folder.is_dir()
    assert run_folder.remade(settings) is False


def test_what_is_set_aside_is_told_on_stderr(settings, capsys):
    folder = settings.folder
    run_folder.set_aside(folder.with_name("none"))
    run_folder.set_aside(folder)
    aside = folder.with_name("run.1")
    assert aside.is_dir() and not folder.exists()
    shown = capsys.readouterr()
    assert shown.err == f"{folder} held an earlier run; it is {aside} now\n" and not shown.out


def test_checkpoints_that_are_set_aside_are_told(settings, capsys):
    start = settings.checkpoint_folder / "step-00000008"
    take_folder(settings, start)
    told = f"checkpoints after step-00000008 are in {start.with_name('aside.1')} now\n"
    assert capsys.readouterr().err == told


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ConfigError) as error, run_folder.usable(tmp_path):
        raise OSError(28, "No space left on device", "a/file")
    assert str(error.value) == (
        f"the run's folder {tmp_path} cannot be used (No space left on device: a/file); make "
        "room or give another output=..."
    )
    with pytest.raises(ConfigError, match=rf"\(odd: {tmp_path}\)"), run_folder.usable(tmp_path):
        raise OSError("odd")


# ---------------------------------------------------------------- finding


def test_only_checkpoints_of_a_launch_are_found(tmp_path, trained):
    for step, launch in ((1, "ours"), (2, "theirs"), (3, None)):
        trained.save(tmp_path, step, keep=9, launch=launch)
    (tmp_path / "step-00000009").mkdir()  # without a state
    reports = []
    assert find_latest(tmp_path, reports.append, "ours").name == "step-00000001"
    assert find_latest(tmp_path, reports.append, "nobody's") is None
    assert not reports
    assert find_latest(tmp_path, reports.append).name == "step-00000003"
    (report,) = reports
    assert report.endswith("; using the checkpoint before it")


def test_a_step_is_read_from_the_name():
    assert run_folder.step_of(Path("runs/one/checkpoints/step-00012345")) == 12345


def test_the_best_of_a_run_is_found_or_else_the_newest(settings, trained, monkeypatch):
    folder = settings.checkpoint_folder
    for step, accuracy in ((17, None), (18, None)):
        trained.save(folder, step, accuracy, keep=9)
    assert run_folder.find(str(settings.folder)).name == "step-00000018"
    trained.save(folder, 19, 0.7, keep=9)
    trained.save(folder, 20, 0.6, keep=9)
    assert run_folder.find(str(settings.folder)).name == "step-00000019"
    assert run_folder.find(str(folder / "step-00000018")).name == "step-00000018"


def test_where_there_is_no_checkpoint_the_way_out_is_told(settings, tmp_path, monkeypatch):
    def said(where: Path) -> str:
        with pytest.raises(checkpoint.CheckpointError) as error:
            run_folder.find(str(where))
        return str(error.value)

    (settings.folder.with_name("begun") / "checkpoints").mkdir(parents=True)
    begun = settings.folder.with_name("begun")
    assert said(begun) == f"{begun} holds no checkpoint yet"
    typed = settings.folder.with_name("rum")
    way_out = "; give a run's name or folder, or a whole checkpoint"
    assert said(typed) == f"there is no folder {typed}; did you mean {settings.folder}?{way_out}"
    monkeypatch.chdir(tmp_path)
    assert said(Path("rum")) == f"there is no folder rum; did you mean run?{way_out}"
    broken = settings.checkpoint_folder / "step-00000016"
    assert said(broken) == (
        f"{broken / 'manifest.json'} is missing; give a run's folder or a whole checkpoint"
    )


def test_a_run_keeps_its_number_when_those_before_it_are_gone(tmp_path, capsys):
    def settings(lr: float) -> Config:
        return Config(output=str(tmp_path), name="m[1]", optimizer=Optimizer(lr=lr))

    for lr in (0.1, 0.2, 0.3):
        take_folder(run_folder.numbered(settings(lr)), None)
    (tmp_path / "m[1]").rename(tmp_path / "away")
    (tmp_path / "m[1]-2").rename(tmp_path / "m[1]-10")
    assert run_folder.numbered(settings(0.3)).name == "m[1]-3"
    assert run_folder.numbered(settings(0.2)).name == "m[1]-10"
    assert run_folder.numbered(settings(0.4)).name == "m[1]"
    with contextlib.ExitStack() as stack:
        assert run_folder.take(settings(0.3), None, settings(0.3), stack).name == "m[1]-3"
    assert "other settings" not in capsys.readouterr().err


def test_copies_that_the_user_made_are_neither_deleted_nor_taken(tmp_path, trained):
    """Of a checkpoint that a kill has left as replaced, by contrast, there is no other."""
    trained.save(tmp_path, 1)
    copy = tmp_path / "step-00000001-paper"
    shutil.copytree(tmp_path / "step-00000001", copy)
    shutil.copytree(copy, tmp_path / "step-00000002.replaced")
    assert [path.name[5:] for path in listing(tmp_path)] == ["00000001", "00000002.replaced"]
    for step in (3, 4, 5):
        trained.save(tmp_path, step, keep=1)
    assert [path.name[5:] for path in listing(tmp_path)] == ["00000005"] and problem(copy) is None


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_made_beforehand_is_the_runs(tmp_path, capsys, linked):
    settings = Config(output=str(tmp_path / "runs"), name="run")
    place = tmp_path / "disk" if linked else settings.folder
    place.mkdir(parents=True)
    (place / "log.txt").write_text("mine")
    if linked:
        settings.folder.parent.mkdir()
        settings.folder.symlink_to(place)
    take_folder(settings, None)
    assert settings.folder.is_symlink() == linked
    made = sorted(path.name for path in place.iterdir())
    assert made == ["checkpoints", "config.yaml", "log.txt"] and not capsys.readouterr().err
    take_folder(settings, None)
    assert "held an earlier run" in capsys.readouterr().err


def test_a_file_in_the_place_of_a_run_is_kept(tmp_path):
    settings = Config(output=str(tmp_path), name="run")
    settings.folder.write_text("mine")
    take_folder(settings, None)
    assert (tmp_path / "run.1").read_text() == "mine" and settings.checkpoint_folder.is_dir()


def test_a_link_to_a_folder_that_is_to_be_made(tmp_path):
    settings = Config(output=str(tmp_path), name="run")
    settings.folder.symlink_to(tmp_path / "disk")
    take_folder(settings, None)
    assert (tmp_path / "disk" / "config.yaml").is_file() and settings.folder.is_symlink()


# ---------------------------------------------------------------- of other users


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Takes the permission to read and search a folder away, from root too."""
    closed: List[Path] = []

    def refusing(call: Callable[..., Any], itself: bool) -> Callable[..., Any]:
        def called(path: Any, *rest: Any, **options: Any) -> Any:
            for folder in closed if isinstance(path, os.PathLike) else ():
                if folder in Path(path).parents or (itself and folder == Path(path)):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *rest, **options)

        return called

    monkeypatch.setattr(os, "stat", refusing(os.stat, itself=False))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir, itself=True))
    return closed.append


def test_what_must_not_be_read_is_told_in_a_line(settings: Config, closed: Any) -> None:
    place = settings.checkpoint_folder / "step-00000016"
    closed(settings.checkpoint_folder)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.find(str(place))
    assert str(error.value) == f"{place} cannot be read: Permission denied"
    with pytest.raises(checkpoint.CheckpointError, match=f"cannot resume: {place} cannot be read"):
        resume.choose(dataclasses.replace(settings, name="mine"), str(place), False)


def test_checkpoints_that_must_not_be_listed_are_not_taken_for_none(
    settings: Config, closed: Any
) -> None:
    """The run would begin anew, and set them aside."""
    closed(settings.checkpoint_folder)
    with pytest.raises(PermissionError):
        resume.choose(settings, "auto", False)
