"""Folders and secrets of one user, which another user of the machine cannot change or read."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.core import private

OTHER = 12345  # some other user


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of this user's."""
    return private.folder(tmp_path / "mine")


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``path`` another user's, for the rest of the test."""
    if os.geteuid() == 0:
        os.chown(path, OTHER, OTHER)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)


def test_a_new_folder_is_the_users_alone(tmp_path: Path) -> None:
    made = private.folder(tmp_path / "parent" / "mine")
    assert made.stat().st_mode & 0o777 == 0o700
    assert private.folder(made) == made


def test_another_users_folder_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(place, monkeypatch)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private.check(place)


def test_so_is_one_in_another_users_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = private.folder(place / "inner")
    give_away(place, monkeypatch)
    with pytest.raises(PermissionError, match=f"{place} belongs to another user"):
        private.check(inner)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_others_can_write_is_refused(place: Path, mode: int) -> None:
    place.chmod(mode)
    with pytest.raises(PermissionError, match="can be written by others: chmod go-w"):
        private.folder(place)


def test_above_it_a_folder_such_as_tmp_will_do(place: Path) -> None:
    inner = private.folder(place / "inner")
    place.chmod(0o777)
    with pytest.raises(PermissionError, match=f"{place} can be written"):
        private.check(inner)
    place.chmod(0o1777)
    private.check(inner)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to a group")
def test_a_group_may_write_where_it_is_the_user(place: Path) -> None:
    place.chmod(0o770)
    private.check(place)
    os.chown(place, 0, OTHER)
    with pytest.raises(PermissionError, match="can be written by others"):
        private.check(place)


def test_a_link_counts_as_where_it_leads(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    private.check(tmp_path / "link")
    place.chmod(0o777)
    with pytest.raises(PermissionError):
        private.check(tmp_path / "link")


SECRET = "from launch.core.private import user_secret; print(user_secret().hex())"


def test_all_processes_of_a_home_have_one_secret(tmp_path: Path) -> None:
    def ask(home: Path) -> str:
        env = {**os.environ, "HOME": str(home)}
        env.pop("XDG_CONFIG_HOME", None)
        return subprocess.run(
            [sys.executable, "-c", SECRET], env=env, capture_output=True, text=True, check=True
        ).stdout

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        (secret,) = set(pool.map(ask, [tmp_path] * 4))
    assert len(bytes.fromhex(secret)) == private.SECRET_BYTES
    assert ask(tmp_path / "another") != secret


def test_without_a_home_there_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as Python where none is known
    with pytest.raises(OSError, match="no home folder"):
        private.user_secret()


@pytest.fixture
def secret(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a secret that was made."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place))
    private.user_secret()
    return place / "gluon-horovod-trainer" / "launch-secret"


def test_the_secret_is_readable_by_the_user_alone(secret: Path) -> None:
    assert secret.stat().st_mode & 0o777 == 0o600
    secret.chmod(0o640)
    with pytest.raises(PermissionError, match=r"launch-secret is not .*: chmod 600"):
        private.user_secret()


def test_nor_is_a_link_or_an_unfinished_file_a_secret(secret: Path) -> None:
    content = secret.read_bytes()
    secret.write_bytes(content[:5])
    with pytest.raises(OSError, match="holds no secret; remove it"):
        private.user_secret()
    secret.rename(secret.with_name("elsewhere"))
    secret.symlink_to(secret.with_name("elsewhere"))
    with pytest.raises(OSError):
        private.user_secret()
