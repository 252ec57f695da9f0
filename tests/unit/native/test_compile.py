"""Compiling the C++ of native/, once, wherever that is possible."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trainer.native import compile

LIBRARY = "momentum"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if nothing had been compiled or loaded yet; returns the cache."""
    monkeypatch.setattr(compile, "_ENVIRONMENT", tmp_path / "environment")
    monkeypatch.setattr(compile, "load", compile.load.__wrapped__)
    monkeypatch.setattr(compile, "_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("compiler", "why"), [("/nowhere/g++", "/nowhere/g++"), ("false", "returned non-zero")]
)
def test_without_a_compiler_it_says_so(
    compiler: str,
    why: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert compile.load(LIBRARY, "it is done in Python", speaks=True) is None
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("it is done in Python, which is slower: ") and why in said
    assert not list(fresh.iterdir())


def test_without_a_place_to_write_it_says_so(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh.write_text("a file, where a folder cannot be made even by root")
    assert compile.load(LIBRARY, "it is done in Python", speaks=True) is None
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("it is done in Python, which is slower: ") and str(fresh) in said


PLANTED = '__attribute__((constructor)) void run() { mkdir("RAN", 0700); }'


@pytest.fixture
def planted(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where loading what lies in the cache under the library's name would make a folder."""
    fresh.mkdir(mode=0o700)
    source = tmp_path / "planted.cc"
    source.write_text("#include <sys/stat.h>\n" + PLANTED.replace("RAN", str(tmp_path / "ran")))
    path = fresh / compile._file_name(LIBRARY)
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return tmp_path / "ran"


@pytest.mark.parametrize("whose", ["another's folder", "everybody's folder", "another's file"])
def test_a_library_that_others_may_have_planted_is_not_loaded(
    whose: str,
    planted: Path,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (library,) = fresh.iterdir()
    if whose == "everybody's folder":
        fresh.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(library if "file" in whose else fresh, 12345, 12345)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
    assert compile.load(LIBRARY, "it is done in Python", speaks=True) is None
    assert not planted.exists()
    (said,) = capsys.readouterr().err.splitlines()
    assert str(fresh) in said and ("another user" in said or "chmod go-w" in said)


def test_the_cache_is_the_users_alone(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-O0" if flag == "-O3" else flag for flag in compile._FLAGS]
    monkeypatch.setattr(compile, "_FLAGS", flags)
    assert compile.load(LIBRARY, "it is done in Python", speaks=True) is not None
    assert fresh.stat().st_mode & 0o777 == 0o700


def test_two_may_compile_at_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-O0" if flag == "-O3" else flag for flag in compile._FLAGS]
    monkeypatch.setattr(compile, "_FLAGS", flags)  # takes a third of the time
    with concurrent.futures.ThreadPoolExecutor() as pool:
        paths = list(pool.map(compile.compile_into, [fresh, fresh], [LIBRARY, LIBRARY]))
    assert set(paths) == set(fresh.iterdir()) == {compile._find(LIBRARY)}
    assert ctypes.CDLL(str(paths[0])).update


def test_a_change_of_any_source_is_recompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "native"
    shutil.copytree(compile._SOURCES, sources)
    monkeypatch.setattr(compile, "_SOURCES", sources)
    names = {compile._file_name(LIBRARY)}
    for path in sources.glob("*.[ch]*"):
        path.write_text(path.read_text() + "\n")
        names.add(compile._file_name(LIBRARY))
    assert len(names) == 1 + len(list(sources.glob("*.[ch]*"))) > 2


@pytest.mark.parametrize("library", compile._LIBRARIES)
def test_the_compiler_finds_nothing_to_warn_of(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "_FLAGS", (*compile._FLAGS, "-O1", "-Wall", "-Wextra", "-Werror"))
    assert compile.compile_into(tmp_path, library).exists()
