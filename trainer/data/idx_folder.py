"""A set as four IDX files of MNIST's names in one folder, gzipped or not, with their sums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Dict, Optional, Tuple

import numpy as np

from . import idx_file
from .idx_file import DataError

# split -> (file of images, file of labels)
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


# Images, uint8 (N, H, W), and labels, int32 (N,).
Arrays = Tuple[np.ndarray, np.ndarray]


def read_split(place: Path, split: str, sums: Dict[str, str]) -> Arrays:
    paths = []
    for name in FILES[split]:
        path = locate(place, name)
        if path is None:
            raise DataError(f"folder {place} holds no file {name}.gz (nor {name})")
        paths.append(path)
    images, labels = (read_file(path, name, sums) for path, name in zip(paths, FILES[split]))
    if len(images) != len(labels):
        raise DataError(
            f"{paths[0]} holds {len(images)} images, but {paths[1]} holds {len(labels)} labels"
        )
    return images, labels.astype(np.int32)


def locate(place: Path, name: str) -> Optional[Path]:
    """Return the path of the named file, gzipped or not, or None where neither is."""
    candidates = (place / f"{name}.gz", place / name)
    return next((path for path in candidates if os.path.isfile(path)), None)


def read_file(path: Path, name: str, sums: Dict[str, str]) -> np.ndarray:
    """The array in an IDX file that must be the file ``name`` of a set with these ``sums``."""
    kind = "images" if "images" in name else "labels"
    content = idx_file.decompressed(path, kind)
    values = idx_file.parsed(content, kind)
    if name in sums:
        _check_sum(path, name, hashlib.sha256(content).hexdigest(), sums)
    return values


def _check_sum(path: Path, name: str, found: str, sums: Dict[str, str]) -> None:
    if found == sums[name]:
        return
    actual_name = next((other for other, value in sums.items() if value == found), None)
    hint = f": it is the content of {actual_name}" if actual_name else ""
    raise DataError(f"{path} has content of SHA-256 {found}, expected {sums[name]}{hint}")
