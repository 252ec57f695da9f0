"""Damaged images, configs and command lines of the trainer work or end in one clear line."""

from __future__ import annotations

import gzip
import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.bad_input import EndError, damage, one_line
from trainer.cli import main as entry
from trainer.config import Config, as_yaml, load
from trainer.data import fashion_mnist, idx_file
from trainer.errors import ConfigError


def idx(kind: int, *shape: int) -> bytes:
    size = 1
    for length in shape:
        size *= length
    return struct.pack(f">HBB{len(shape)}I", 0, 8, kind, *shape) + bytes(i % 7 for i in range(size))


@settings(max_examples=150)
@given(of_images=st.booleans(), packed=st.booleans(), inside=st.booleans(), spoil=damage())
def test_damaged_images_and_labels(tmp_path_factory, of_images, packed, inside, spoil):
    folder = tmp_path_factory.mktemp("idx")
    contents = [idx(3, 4, 5, 6), idx(1, 4)]
    for place, name in enumerate(fashion_mnist.FILES["train"]):
        content, damaged = contents[place], of_images == (place == 0)
        if damaged and (inside or not packed):
            content = spoil(content)
        if packed:
            content = gzip.compress(content, mtime=0)
            content = spoil(content) if damaged and not inside else content
        (folder / (f"{name}.gz" if packed else name)).write_bytes(content)
    try:
        images, labels = fashion_mnist.load("train", str(folder), "idx")
    except idx_file.DataError as error:
        assert str(folder) in one_line(error)
    else:
        assert images.ndim == 3 and labels.shape == (len(images),) and images.size > 0


@settings(max_examples=100)
@given(st.one_of(st.binary(max_size=40), damage().map(lambda f: f(as_yaml(Config()).encode()))))
def test_any_bytes_of_a_config_file(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load(str(path)), Config)
    except ConfigError as error:
        one_line(error)


WORDS = [
    "train",
    "evaluate",
    "calibrate",
    "config",
    "predict",
    "export",
    "--resume",
    "--force",
    "--samples",
    "--output",
    "-h",
    "--",
    "0",
    "-1",
    "auto",
    "none",
    "seed=1",
    "device=gpu",
    "optimizer.name=sdg",
    "model.factory=a:b",
    "configs/quickstart.yaml",
]


# No system passes a NUL on to a program.
ARGUMENT = st.text(st.characters(blacklist_characters="\0"), max_size=8)


@settings(max_examples=80)
@given(
    command=st.sampled_from(["train", "evaluate", "calibrate", "predict", "export", "config"]),
    rest=st.lists(st.one_of(ARGUMENT, st.sampled_from(WORDS)), max_size=4),
)
@example("train", ['output="\\0"'])
@example("train", ["output=/proc/nowhere"])
def test_any_command_line(tmp_path_factory, monkeypatch, capsys, command, rest):
    """Without data a run cannot start, so that each ends before it has written anything."""

    def leave(code: int) -> None:
        raise EndError(code)

    folder = tmp_path_factory.mktemp("empty")
    nowhere = ["data.dataset=idx", "data.folder=nowhere"]
    capsys.readouterr()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(entry.console, "leave", leave)
    monkeypatch.setattr(
        "sys.argv", ["trainer", command, *rest, *nowhere[: 2 * (command == "train")]]
    )
    try:
        entry.run()
    except EndError as end:
        assert end.args == (entry.USER_ERROR,)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.endswith("\n")
        assert len(error.splitlines()) == 1 and len(error) > 10
    assert list(folder.iterdir()) == []
