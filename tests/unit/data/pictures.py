"""Pictures and record files that tests make."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import mxnet as mx
import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours that vary slowly, uint8 (height, width, 3): JPEG changes them little."""
    small = np.random.RandomState(seed).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: Any, kind: str = "JPEG", mode: str = "", **options: Any) -> bytes:
    """A file of these pixels, or of a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if mode:
        image = image.convert(mode)
    if kind == "JPEG":
        options = {"quality": 95, **options}
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def make_folder(root: Path, counts: Sequence[int], size: Tuple[int, int] = (40, 50)) -> List[Path]:
    """JPEGs and PNGs in a folder for each class, no two alike; sorted."""
    made = []
    for label, count in enumerate(counts):
        place = root / CLASSES[label]
        place.mkdir(parents=True)
        for number in range(count):
            kind = "PNG" if number % 3 == 0 else "JPEG"
            path = place / f"{number:02}.{kind.lower()}"
            path.write_bytes(encoded(smooth(size[0] + number, size[1], 100 * label + number), kind))
            made.append(path)
    return made


def make_records(path: Path, samples: Sequence[Tuple[float, bytes]]) -> None:
    """A record file and its index, by MXNet's own writer."""
    writer = mx.recordio.MXIndexedRecordIO(str(path.with_suffix(".idx")), str(path), "w")
    for number, (label, content) in enumerate(samples):
        head = mx.recordio.IRHeader(0, label, number, 0)
        writer.write_idx(number, mx.recordio.pack(head, content))
    writer.close()
