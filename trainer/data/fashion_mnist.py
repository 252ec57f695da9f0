"""Fashion-MNIST: finds or downloads its four files, verifies them and reads them into arrays.

Three datasets, all in MNIST's IDX format (see idx_file.py), gzipped or not:

- `fashion_mnist`: the real set (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747), 60,000 training
  and 10,000 test images. Every file is checked against the SHA-256 of its decompressed content,
  because the copies in circulation differ in their compression.
- `fashion_mnist_sample`: 2,000 + 500 of those images, kept in sample/. Used only on request.
- `idx`: any set under the four standard file names (MNIST, KMNIST, your own) or EMNIST's, in a
  given folder; the two of the test set may be missing.

`python -m trainer.data.fashion_mnist` finds or downloads the real set and prints its folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple
from urllib.parse import urlsplit

import numpy as np

from .. import console
from ..dist import environment, file_lock
from .idx_file import DataError, folder_at, held, listed, locate, read

log = logging.getLogger(__name__)

# split -> (file of images, file of labels)
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

Arrays = Tuple[np.ndarray, np.ndarray]  # images, uint8 (N, H, W), and labels, int32 (N,)

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
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
CONNECT_SECONDS = 10.0  # until a mirror answers, and between two chunks of its answer
LOCK_SECONDS = 600.0  # until another process of this node has finished downloading

WAYS_OUT = (
    "Three ways out: `apt-get install dataset-fashion-mnist` (Debian, Ubuntu); or put the four"
    " files of https://github.com/zalandoresearch/fashion-mnist into a folder and set"
    " data.folder=FOLDER; or use the project's small sample, data.dataset=fashion_mnist_sample"
)

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SAMPLE_FOLDER = Path(__file__).with_name("sample")


def load(split: str, folder: Optional[str] = None, dataset: str = "fashion_mnist") -> Arrays:
    """Find or download the dataset and read one split of it; raises as `find_or_download` does.

    Images are uint8 (N, H, W), read-only, 28 x 28 but for `idx`; labels int32 (N,). The `split` is
    "train" or "test"; without a `folder` of the files see `find_or_download`.
    """
    return _search([split], folder, dataset)[1][0]


def splits(folder: Optional[str], dataset: str) -> List[str]:
    """The splits that there are: ``idx`` may have no test set, neither of its files."""
    place = _only_place(folder, dataset) if dataset == "idx" else None
    if place is None:
        return list(FILES)
    paths = {name: locate(place, name) for names in FILES.values() for name in names}
    used = {path.name.replace(".gz", "") for path in paths.values() if path is not None}
    others = [name for name in held(place) if name not in used]
    if others and environment.rank() == 0:
        console.warn_once(f"folder {place} holds IDX files that are not read: {listed(others, 5)}")
    return list(FILES) if any(paths[name] for name in FILES["test"]) else ["train"]


def find_or_download(folder: Optional[str] = None, dataset: str = "fashion_mnist") -> Path:
    """Return a folder that holds the dataset's four files, verified.

    If a folder is given, only that one is searched. Otherwise `fashion_mnist` is looked for in
    MXNet's cache, in Debian's package and in this project's cache; failing that, one process of
    the node downloads it there while the others wait.

    Raises DataError where a file is missing or wrong, with what was found and expected; or where
    the set is nowhere and no mirror can be reached, with the ways out.
    """
    return _search(list(FILES), folder, dataset)[0]


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

    def found_at(place: Path) -> Tuple[Path, List[Arrays]]:
        return place, [_read_split(place, split, sums) for split in splits]

    if only_place is not None:
        return found_at(only_place)
    cache = cache_folder()
    mxnet_home = Path(os.environ.get("MXNET_HOME", "~/.mxnet")).expanduser()
    for place in (mxnet_home / "datasets" / "fashion-mnist", DEBIAN_FOLDER, cache):
        if all(locate(place, name) for split in splits for name in FILES[split]):
            try:
                return found_at(place)
            except DataError as error:
                log.warning("%s; looking further", error)
    _download_once(cache, sums)
    return found_at(cache)


def _read_split(place: Path, split: str, sums: Dict[str, str]) -> Arrays:
    paths = []
    for name in FILES[split]:
        path = locate(place, name)
        if path is None:
            raise DataError(f"folder {place} holds no file {name}.gz (nor {name})")
        paths.append(path)
    images, labels = (read(path, name, sums) for path, name in zip(paths, FILES[split]))
    if len(images) != len(labels):
        raise DataError(
            f"{paths[0]} holds {len(images)} images, but {paths[1]} holds {len(labels)} labels"
        )
    return images, labels.astype(np.int32)


def _only_place(folder: Optional[str], dataset: str) -> Optional[Path]:
    """The one folder where the dataset can be; None for the real set, which has several."""
    if dataset == "arrays":
        raise DataError(
            "data.dataset is arrays: images given to fit(), which are not kept; give them to it "
            "again, or grey ones as files, data.dataset=idx data.folder=FOLDER"
        )
    if dataset not in SHA256:
        raise DataError(f"dataset is {dataset!r}, expected one of {', '.join(SHA256)}")
    if folder is not None:
        return folder_at(folder)
    if dataset == "idx":
        raise DataError("dataset idx has no place of its own: set data.folder to its folder")
    if dataset == "fashion_mnist_sample":
        return SAMPLE_FOLDER
    return None


def _download_once(cache: Path, sums: Dict[str, str]) -> None:
    """Download what the cache lacks, unless another process of this node does so meanwhile."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with file_lock.held(cache / ".lock", LOCK_SECONDS):
            for name in sums:
                path = locate(cache, name)
                with contextlib.suppress(DataError):
                    if path is not None and len(read(path, name, sums)):
                        continue
                _download(name, cache, sums)
    except TimeoutError:
        raise DataError(
            f"another process has been downloading into {cache} for {LOCK_SECONDS:.0f} s:"
            " end it, or wait and start again"
        ) from None
    except OSError as error:
        raise DataError(f"cannot write to {cache} ({error}). {WAYS_OUT}") from None


def _download(name: str, cache: Path, sums: Dict[str, str]) -> None:
    """Download one file from the first mirror that has it; it appears once verified."""
    from pooch import HTTPDownloader

    partial, path = cache / f"{name}.gz.partial", cache / f"{name}.gz"
    fetch = HTTPDownloader(progressbar=True, chunk_size=1 << 16, timeout=CONNECT_SECONDS)
    failures = []
    for mirror in MIRRORS:
        try:
            log.info("downloading %s%s.gz", mirror, name)
            fetch(f"{mirror}{name}.gz", str(partial), None)
            read(partial, name, sums)
        except DataError as error:
            failures.append(str(error))
        except OSError as error:  # requests' exceptions are OSErrors
            failures.append(f"{urlsplit(mirror).netloc}: {error.strerror or type(error).__name__}")
        else:
            os.replace(partial, path)
            return
    raise DataError(
        f"Fashion-MNIST is not on this machine and cannot be downloaded ({'; '.join(failures)})."
        f" {WAYS_OUT}"
    )


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
