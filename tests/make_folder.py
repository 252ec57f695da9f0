"""Make a small folder of pictures from the sample: `python -m tests.make_folder FOLDER`.

JPEGs and PNGs of several sizes in FOLDER/train/CLASS and FOLDER/test/CLASS, 30 and 10 of each
class. The same files each time; a folder that is there already is left as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from trainer.data.fashion_mnist import CLASS_NAMES, load

PER_CLASS = {"train": 30, "test": 10}


def make(folder: Path) -> None:
    """Write the pictures."""
    for split, count in PER_CLASS.items():
        images, labels = load(split, dataset="fashion_mnist_sample")
        made = dict.fromkeys(range(len(CLASS_NAMES)), 0)
        for image, label in zip(images, labels.tolist()):
            number = made[label]
            if number == count:
                continue
            made[label] += 1
            place = folder / split / CLASS_NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            width, height = 48 + 8 * (number % 5), 48 + 8 * (number % 3)
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            if number % 3 == 0:
                picture.save(place / f"{number:03}.png")
            else:
                picture.convert("RGB").save(place / f"{number:03}.jpg", quality=90)


def main() -> None:
    folder = Path(sys.argv[1])
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    make(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
