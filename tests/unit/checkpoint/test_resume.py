"""Which checkpoint a run goes on from."""

from __future__ import annotations

import pytest

from trainer.checkpoint import CheckpointError, resume, run_folder
from trainer.config import Config, to_dict
from trainer.errors import ConfigError

from .runs import one_line


@pytest.mark.parametrize(
    ("launch", "asked", "step"),
    [
        ("ours", "auto", 9),
        ("ours", "none", 6),  # what this launch has saved before it was started again
        ("ours", "PATH", 6),
        ("new", "none", None),
        ("new", "PATH", 3),
        (None, "none", None),
        (None, "PATH", 3),
    ],
)
def test_where_a_restarted_launch_resumes(tmp_path, monkeypatch, trained, launch, asked, step):
    settings = Config(output=str(tmp_path))
    folder = settings.checkpoint_folder
    for number, made_by in ((3, None), (6, "ours"), (9, "theirs")):
        trained.save(folder, number, keep=3, launch=made_by, config=to_dict(settings))
    monkeypatch.delenv("LAUNCH_ID", raising=False)
    if launch is not None:
        monkeypatch.setenv("LAUNCH_ID", launch)
    wanted = str(folder / "step-00000003") if asked == "PATH" else asked
    found = resume.choose(settings, wanted, force=False)
    assert found == (None if step is None else folder / f"step-{step:08d}")


def test_a_second_run_of_one_process_is_not_taken_for_one_started_again(
    tmp_path, monkeypatch, trained
):
    settings = Config(output=str(tmp_path))
    monkeypatch.setenv("LAUNCH_ID", "ours")
    with run_folder.taken_folder(settings, None):
        folder = settings.checkpoint_folder
        trained.save(folder, 6, launch="ours", config=to_dict(settings))
    assert resume.choose(settings, "none", force=False) is None
    assert resume.choose(settings, "auto", force=False) == folder / "step-00000006"


@pytest.mark.parametrize("place", [False, None, 3])
def test_what_is_no_path_is_not_resumed_from(tmp_path, place):
    with pytest.raises(ConfigError, match=f"resume is {place}; it must be 'auto', 'none' or the"):
        resume.choose(Config(output=str(tmp_path)), place, force=False)


def test_only_a_checkpoint_is_resumed_from_and_those_nearby_are_named(tmp_path, trained):
    run, other = (Config(output=str(tmp_path), name=name) for name in ("run", "other"))
    path = trained.save(run.checkpoint_folder, 3)
    for place, said in (
        (run.folder, f"{run.folder} holds checkpoints; give one of them, e.g. {path}"),
        (path.parent, f"{path.parent} holds checkpoints; give one of them, e.g. {path}"),
        (
            "last",
            "cannot resume: last is no checkpoint's folder; give auto, none or a whole checkpoint",
        ),
        (path / "model.params", "model.params is no checkpoint's folder"),
    ):
        with pytest.raises(CheckpointError) as error:
            resume.choose(other, str(place), force=False)
        assert said in one_line(error)
