"""Make tests/sample from the real Fashion-MNIST: `python tests/make_sample.py`.

The sample holds the first 200 training and the first 50 test images of each class, in the order of
the real set, in the same gzipped IDX format. The same input gives the same content everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from trainer.data.fashion_mnist import FILES, SAMPLE_FOLDER, load

PER_CLASS = {"train": 200, "test": 50}


def stratify(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Return the ascending indices of the first `per_class` samples of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in set(labels)]))


def write_idx(path: Path, array: np.ndarray) -> str:
    """Write a uint8 array as gzipped IDX and return the SHA-256 of the decompressed file."""
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content, mtime=0))
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    for split, (images_name, labels_name) in FILES.items():
        images, labels = load(split)
        chosen = stratify(labels, PER_CLASS[split])
        arrays = {images_name: images[chosen], labels_name: labels[chosen].astype(np.uint8)}
        for name, array in arrays.items():
            print(name, write_idx(SAMPLE_FOLDER / f"{name}.gz", array))


if __name__ == "__main__":
    main()
