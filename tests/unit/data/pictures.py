"""Pictures and record files that tests make."""

from __future__ import annotations

import io
import struct
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


def tiff(levels: np.ndarray, bits: int, photometric: int = 1, extra: Sequence[int] = ()) -> bytes:
    """A TIFF of one strip, of kinds that Pillow does not write: (H, W[, bands]) in any type."""
    height, width, bands = (*levels.shape, 1)[:3]
    content = levels.tobytes()
    if bits == 12:  # two levels in three bytes
        pairs = levels.reshape(-1, 2).astype(int)
        three = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
        content = np.stack(three, axis=1).astype(np.uint8).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    tags = {256: [width], 257: [height], 258: [bits] * bands, 259: [1], 262: [photometric]}
    tags.update({273: [0], 277: [bands], 278: [height], 279: [len(content)]})
    tags.update({338: list(extra), 339: [kind] * bands} if extra else {339: [kind] * bands})
    behind, entries, start = b"", b"", 8 + 2 + 12 * len(tags) + 4
    lists = sum(2 * len(values) for values in tags.values() if len(values) > 2)
    for tag, values in tags.items():
        if tag in (273, 279):  # 32 bits
            value = start + lists if tag == 273 else values[0]
            entries += struct.pack("<HHII", tag, 4, 1, value)
            continue
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            behind, packed = behind + packed, struct.pack("<I", start + len(behind))
        entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + bytes(4) + behind + content


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
