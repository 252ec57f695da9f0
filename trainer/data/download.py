"""Downloads Fashion-MNIST from its mirrors, once per node, and verifies it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Dict
from urllib.parse import urlsplit

from ..dist import file_lock
from .idx_file import DataError
from .idx_folder import locate, read_file

log = logging.getLogger(__name__)


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


def download_once(cache: Path, sums: Dict[str, str]) -> None:
    """Download what the cache lacks, unless another process of this node does so meanwhile."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with file_lock.held(cache / ".lock", LOCK_SECONDS):
            for name in sums:
                if not _is_verified(cache, name, sums):
                    _download(name, cache, sums)
    except TimeoutError:
        raise DataError(
            f"another process has been downloading into {cache} for {LOCK_SECONDS:.0f} s:"
            " end it, or wait and start again"
        ) from None
    except OSError as error:
        raise DataError(f"cannot write to {cache} ({error}). {WAYS_OUT}") from None


def _is_verified(place: Path, name: str, sums: Dict[str, str]) -> bool:
    path = locate(place, name)
    try:
        return path is not None and read_file(path, name, sums) is not None
    except DataError:
        return False


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
            read_file(partial, name, sums)
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
