"""Fashion-MNIST: finds or downloads its four files, verifies them and reads them into arrays.

Three datasets, all in MNIST's IDX format (see idx_file.py), gzipped or not:

- `fashion_mnist`: the real set (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747), 60,000 training
  and 10,000 test images. Every file is checked against the SHA-256 of its decompressed content,
  because the copies in circulation differ in their compression.
- `fashion_mnist_sample`: 2,000 + 500 of those images, kept in sample/. Used only on request.
- `idx`: any set under the four standard file names (MNIST, KMNIST, your own), in a given folder.

`python -m trainer.data.fashion_mnist` finds or downloads the real set and prints its folder.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from .. import console
from .download import download_once, log
from .idx_file import DataError
from .idx_folder import FILES, Arrays, locate, read_split

# file -> SHA-256 of its decompressed content
REAL_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SAMPLE_SHA256 = {  # as tests/make_sample.py prints them
    "train-images-idx3-ubyte": "a724cd72799a6b1c3a81c4263865a75a73bb6473673b3394e34adf222930f19e",
    "train-labels-idx1-ubyte": "4738fd437c0f8d6498ae7f6f5c86f1cc3c878d4116ff169fc5635bd6847899cc",
    "t10k-images-idx3-ubyte": "8fdf02ada67d92f4db5ba3c2f6c5b1cc6186ba6e0efd4914661e4389e103b81e",
    "t10k-labels-idx1-ubyte": "9c71808b3a0ebfc091442c0009a7aa35be2d9622bf6aaf6891ce9a0088e96c07",
}
SHA256: Dict[str, Dict[str, str]] = {
    "fashion_mnist": REAL_SHA256,
    "fashion_mnist_sample": SAMPLE_SHA256,
    "idx": {},
}

# Names of classes 0 to 9, as in d2lzh.get_fashion_mnist_labels.
CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

IMAGE_SIZE = (28, 28)  # (height, width)

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SAMPLE_FOLDER = Path(__file__).with_name("sample")


def load(split: str, folder: Optional[str] = None, dataset: str = "fashion_mnist") -> Arrays:
    """Find or download the dataset and read one split of it.

    Args:
        split: "train" or "test".
        folder: where the files are. None: see `find_or_download`.
        dataset: "fashion_mnist", "fashion_mnist_sample" or "idx".

    Returns:
        Images, uint8 (N, H, W), read-only, 28 x 28 but for `idx`; and labels, int32 (N,).

    Raises:
        DataError: as `find_or_download` does.
    """
    _check_choice("split", split, FILES)
    _, arrays = _search([split], folder, dataset)
    return arrays[0]


def find_or_download(folder: Optional[str] = None, dataset: str = "fashion_mnist") -> Path:
    """Return a folder that holds the dataset's four files, verified.

    If a folder is given, only that one is searched. Otherwise `fashion_mnist` is looked for in
    MXNet's cache, in Debian's package and in this project's cache; failing that, one process of
    the node downloads it there while the others wait.

    Raises:
        DataError: a file is missing or wrong, with what was found and expected; or the set is
            nowhere and no mirror can be reached, with the ways out.
    """
    place, _ = _search(list(FILES), folder, dataset)
    return place


def class_names(dataset: str, num_classes: int) -> List[str]:
    """A name for each class; its number where the dataset names none."""
    known = CLASS_NAMES if dataset.startswith("fashion_mnist") else ()
    return [*known, *map(str, range(len(known), num_classes))]


def cache_folder() -> Path:
    """Return the folder that downloads go to, under $XDG_CACHE_HOME or ~/.cache."""
    from platformdirs import user_cache_path

    return user_cache_path("fashion-mnist")


def _search(
    splits: Sequence[str], folder: Optional[str], dataset: str
) -> Tuple[Path, List[Arrays]]:
    """Read the splits from the first place that holds them, and return that place with them."""
    only_place = _only_place(folder, dataset)
    sums = SHA256[dataset]

    def read(place: Path) -> Tuple[Path, List[Arrays]]:
        return place, [read_split(place, split, sums) for split in splits]

    if only_place is not None:
        return read(only_place)
    cache = cache_folder()
    mxnet_home = Path(os.environ.get("MXNET_HOME", "~/.mxnet")).expanduser()
    for place in (mxnet_home / "datasets" / "fashion-mnist", DEBIAN_FOLDER, cache):
        if all(locate(place, name) for split in splits for name in FILES[split]):
            try:
                return read(place)
            except DataError as error:
                log.warning("%s; looking further", error)
    download_once(cache, sums)
    return read(cache)


def _only_place(folder: Optional[str], dataset: str) -> Optional[Path]:
    """The one folder where the dataset can be; None for the real set, which has several."""
    if dataset == "arrays":
        raise DataError(
            "data.dataset is arrays: images given to fit(), which are not kept; give them to it "
            "again, or grey ones as files, data.dataset=idx data.folder=FOLDER"
        )
    _check_choice("dataset", dataset, SHA256)
    if folder is not None:
        return Path(folder).expanduser()
    if dataset == "idx":
        raise DataError("dataset idx has no place of its own: set data.folder to its folder")
    if dataset == "fashion_mnist_sample":
        return SAMPLE_FOLDER
    return None


def _check_choice(what: str, given: str, allowed: Iterable[str]) -> None:
    if given not in allowed:
        raise DataError(f"{what} is {given!r}, expected one of {', '.join(allowed)}")


def main() -> int:
    """Print the folder of the real set, or why there is none; return the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        console.answer(str(find_or_download()))
    except DataError as error:
        console.print_line(str(error))
        return 1
    return 0


if __name__ == "__main__":
    console.run(main)
