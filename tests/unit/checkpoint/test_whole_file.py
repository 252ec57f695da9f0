"""Atomic writes of files and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checkpoint import whole_file


def test_a_file_is_replaced_when_all_of_it_is_there(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    with pytest.raises(KeyError), whole_file.replaced(link) as partial:
        partial.write_text("half of")
        raise KeyError
    assert file.read_text() == "old"
    with whole_file.replaced(link) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and link.is_symlink()
    assert set(tmp_path.iterdir()) == {file, link}


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    """Somebody else's, in a folder that several users may write."""
    secret, file = tmp_path / "secret", tmp_path / "file"
    secret.write_text("of another user")
    (tmp_path / ".file.partial").symlink_to(secret)
    with whole_file.replaced(file) as partial:
        partial.write_text("new")
    assert (secret.read_text(), file.read_text()) == ("of another user", "new")
    assert not file.is_symlink()


def test_a_device_stays_one() -> None:
    with whole_file.replaced(Path("/dev/null")) as partial:
        partial.write_text("gone")
    assert Path("/dev/null").is_char_device()


def test_a_folder_gets_all_files_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    with pytest.raises(KeyError), whole_file.filled(folder) as partial:
        (partial / "one").touch()
        raise KeyError
    assert not folder.exists()
    for name in ("one", "two"):
        with whole_file.filled(folder) as partial:
            (partial / name).write_text(name)
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("way", [whole_file.replaced, whole_file.filled])
def test_what_cannot_be_written_is_reported_at_once_by_its_own_name(way, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    with pytest.raises(NotADirectoryError) as caught, way(place):
        pytest.fail("there is nowhere to write")
    assert caught.value.filename == str(place)
