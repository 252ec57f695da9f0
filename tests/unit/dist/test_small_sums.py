"""What ranks tell each other: JSON and arrays, whoever sends it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Callable, List, Tuple

import numpy as np
import pytest

from trainer.dist import small_sums


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Tuple[Callable[..., Any], Tuple[str]]:
        return os.mkdir, (str(self.folder),)


def of_two(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray, str], np.ndarray]:
    """The allreduce of rank 0 of two, of which the other sends these bytes for an object."""
    monkeypatch.setattr(small_sums, "world_size", lambda: 2)
    monkeypatch.setattr(small_sums, "rank", lambda: 0)
    words = np.frombuffer(sent + bytes(-len(sent) % 8), np.int64)

    def allreduce(values: np.ndarray, name: str) -> np.ndarray:
        theirs = np.zeros_like(values)
        theirs[-1 if name == "object.sizes" else slice(-words.size, None)] = (
            words.size if name == "object.sizes" else words
        )
        return values + theirs

    return allreduce


def test_a_pickle_from_the_network_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = pickle.dumps(Hostile(tmp_path / "ran"))
    with pytest.raises(ValueError):
        small_sums.gather("mine", of_two(sent, monkeypatch))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        None,
        "ä",
        [1.5, float("inf"), -(2**63), True],
        {"step": 7, "config": {"model": {"arguments": {}}}, "array": [["<f4"], []]},
        np.arange(6, dtype=np.float16).reshape(2, 3),
        ["MT19937", np.arange(4, dtype=np.uint32)[::2], 624, 0, 0.0],
    ],
)
def test_what_is_told_arrives(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_sums, "world_size", lambda: 1)
    (told,) = small_sums.gather(value, lambda values, name: values)
    assert _plain(told) == _plain(value)


def _plain(value: Any) -> Any:
    """For a comparison: arrays with their type and shape."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tolist()]
    return [_plain(item) for item in value] if isinstance(value, list) else value


def test_objects_of_classes_are_not_sent() -> None:
    sent: List[object] = [Path("x"), {1}, np.array([None]), np.zeros(2, [("a", "i4")])]
    for value in sent:
        with pytest.raises(TypeError):
            small_sums.gather(value, lambda values, name: values)
