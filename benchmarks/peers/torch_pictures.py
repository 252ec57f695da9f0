"""PyTorch's DataLoader with two workers and Pillow over the JPEGs of a folder; prints images/s.

    .venv-bench/bin/python benchmarks/peers/torch_pictures.py FOLDER SIDE BATCH MEAN STD

Each picture is cut and mirrored by the calls of Pillow's that torchvision's RandomResizedCrop and
RandomHorizontalFlip make. Like the others', the time begins with the second batch.
"""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path
from typing import Any, Tuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):  # type: ignore[misc]
    """float32 (3, side, side) of each picture, and its number for a label."""

    def __init__(self, folder: str, side: int, mean: float, std: float):
        self.content = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
        self.side, self.mean, self.std = side, mean, std

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = Image.open(io.BytesIO(self.content[index])).convert("RGB")
        image = image.crop(part(image.width, image.height)).resize(
            (self.side, self.side), Image.Resampling.BILINEAR
        )
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        planes = pixels.view(self.side, self.side, 3).permute(2, 0, 1).float()
        return planes.div_(255).sub_(self.mean).div_(self.std), index % 10


def part(width: int, height: int) -> Tuple[int, int, int, int]:
    """A part of 8 to 100 % of the area, of aspect 3/4 to 4/3: left, top, right, bottom."""
    for _ in range(10):
        share, aspect, x, y = torch.rand(4).tolist()
        area = (0.08 + 0.92 * share) * width * height
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(x * (width - wide + 1)), int(y * (height - high + 1))
            return left, top, left + wide, top + high
    return 0, 0, width, height


def main() -> None:
    folder, side, batch, mean, std = sys.argv[1:]
    pictures = Pictures(folder, int(side), float(mean), float(std))
    images, began = 0, 0.0
    for number, (data, _) in enumerate(DataLoader(pictures, int(batch), True, num_workers=2)):
        if number == 0:
            began = time.perf_counter()
        else:
            images += len(data)
    print(images / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
