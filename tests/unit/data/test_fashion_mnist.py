"""Fashion-MNIST: finding, refusing, downloading and reading its files.

Where a test needs "the real set" in many places, the committed sample stands in for it: the
fixture `places` makes its SHA-256 the expected ones and moves every place under a temporary folder.
"""

from __future__ import annotations

import gzip
import http.server
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Data
from trainer.data import fashion_mnist, input_pipeline
from trainer.data.fashion_mnist import FILES, SAMPLE_FOLDER, find_or_download, load
from trainer.data.idx_file import DataError
from trainer.dist import file_lock

NAMES = [name for names in FILES.values() for name in names]
UNREACHABLE = "http://127.0.0.1:9/"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty places to search, no mirror that answers, and the sample as the set to look for."""
    monkeypatch.setenv("MXNET_HOME", str(tmp_path / "mxnet"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "MIRRORS", (UNREACHABLE,))
    monkeypatch.setitem(fashion_mnist.SHA256, "fashion_mnist", fashion_mnist.SAMPLE_SHA256)
    return SimpleNamespace(
        mxnet=tmp_path / "mxnet" / "datasets" / "fashion-mnist",
        debian=tmp_path / "debian",
        cache=tmp_path / "cache" / "fashion-mnist",
    )


@pytest.fixture
def serve():
    """Serve folders over HTTP on this machine; returns (address, paths asked for) of each."""
    servers = []

    def start(folder):
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def do_GET(self):
                asked.append(self.path.lstrip("/"))
                super().do_GET()

            def log_message(self, *arguments):
                """Keep the test's output clean."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def copy_sample(folder):
    return Path(shutil.copytree(str(SAMPLE_FOLDER), str(folder)))


def content_of(path):
    return gzip.decompress(path.read_bytes())


def write_set(folder, images, labels, split="train", compress=False):
    """Write one split in IDX format, as the documents of MNIST describe it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES[split], (images, labels)):
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        content += array.astype(np.uint8).tobytes()
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)


# -- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "per_class"), [("train", 200), ("test", 50)])
def test_sample_is_stratified(split, per_class):
    images, labels = load(split, dataset="fashion_mnist_sample")
    assert (images.shape, images.dtype) == ((10 * per_class, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((10 * per_class,), np.int32)
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), per_class)


def test_sample_is_small():
    assert sum(path.stat().st_size for path in SAMPLE_FOLDER.iterdir()) < 2 << 20


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(),
    reason="needs the real set (`apt-get install dataset-fashion-mnist`, which make test does)",
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_sample_is_of_the_real_set(split):
    images, labels = load(split, str(fashion_mnist.DEBIAN_FOLDER))
    assert images.shape == ({"train": 60_000, "test": 10_000}[split], 28, 28)
    sample_images, sample_labels = load(split, dataset="fashion_mnist_sample")
    for label in range(10):
        of_class = sample_images[sample_labels == label]
        np.testing.assert_array_equal(of_class, images[labels == label][: len(of_class)])


def test_class_names_are_those_of_d2lzh():
    import d2lzh

    assert list(fashion_mnist.CLASS_NAMES) == d2lzh.get_fashion_mnist_labels(range(10))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    compress=st.booleans(),
    data=st.data(),
)
def test_idx_reads_what_was_written(tmp_path_factory, shape, compress, data):
    values = st.integers(0, 255)
    size = int(np.prod(shape))
    images = np.array(data.draw(st.lists(values, min_size=size, max_size=size))).reshape(shape)
    labels = np.array(data.draw(st.lists(values, min_size=shape[0], max_size=shape[0])))
    folder = tmp_path_factory.mktemp("idx")
    write_set(folder, images, labels, compress=compress)
    read_images, read_labels = load("train", str(folder), dataset="idx")
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels)


# -- refusing --------------------------------------------------------------------------------


def damaged(name, damage):
    """Return the bytes of the sample's file with one kind of damage."""
    path = SAMPLE_FOLDER / f"{name}.gz"
    content = content_of(path)
    if damage == "gzip cut short":
        return path.read_bytes()[:-100]
    if damage == "empty":
        return b""
    if damage == "not an archive":
        return b"<html>404 Not Found</html>"
    if damage == "archive damaged":
        return path.read_bytes()[:50] + bytes(50) + path.read_bytes()[100:]
    if damage == "more behind it":
        return path.read_bytes() + b"more"
    if damage == "content cut short":
        return gzip.compress(content[:-1])
    if damage == "header alone":
        return gzip.compress(content[:6])
    assert damage == "one bit flipped"
    return gzip.compress(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("gzip cut short", "truncated or corrupt, expected a gzipped IDX file"),
        ("archive damaged", "truncated or corrupt, expected a gzipped IDX file"),
        ("more behind it", r"cannot be read: Not a gzipped file \(b'mo"),
        ("empty", "begins with nothing, expected 0000080[13]"),
        ("not an archive", "begins with 3c68746d, expected 0000080[13]"),
        ("content cut short", r"truncated or corrupt: \d+ bytes of (images|labels), expected \d+"),
        ("header alone", "truncated: 6 bytes, expected (8|16) and more"),
        ("one bit flipped", "has content of SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$"),
    ],
)
def test_damaged_file_is_named(tmp_path, name, damage, says):
    folder = copy_sample(tmp_path / "set")
    bad = folder / f"{name}.gz"
    bad.write_bytes(damaged(name, damage))
    with pytest.raises(DataError, match=says) as error:
        find_or_download(str(folder), "fashion_mnist_sample")
    assert str(error.value).startswith(str(bad))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given_file", "as_file", "says"),
    [
        (
            "train-labels-idx1-ubyte",
            "train-images-idx3-ubyte",
            r"begins with 00000801 \(uint8, 1-D\), expected 00000803 \(images: uint8, 3-D\)",
        ),
        (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            r"begins with 00000803 \(uint8, 3-D\), expected 00000801 \(labels: uint8, 1-D\)",
        ),
        (
            "t10k-images-idx3-ubyte",
            "train-images-idx3-ubyte",
            "it is the content of t10k-images-idx3-ubyte",
        ),
    ],
)
def test_swapped_file_is_named(tmp_path, given_file, as_file, says):
    folder = copy_sample(tmp_path / "set")
    shutil.copy(str(SAMPLE_FOLDER / f"{given_file}.gz"), str(folder / f"{as_file}.gz"))
    with pytest.raises(DataError, match=says) as error:
        load("train", str(folder), "fashion_mnist_sample")
    assert str(error.value).startswith(str(folder / f"{as_file}.gz"))


@given(length=st.integers(0, 1032))
def test_no_truncation_goes_unnoticed(tmp_path_factory, length):
    folder = copy_sample(tmp_path_factory.mktemp("cut") / "set")
    path = folder / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    assert length < len(whole)
    path.write_bytes(whole[:length])
    with pytest.raises(DataError):
        load("train", str(folder), dataset="idx")


READ = """
import resource, sys
from pathlib import Path
from trainer.data import idx_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    idx_file.read(Path(sys.argv[1]), "images")
except idx_file.DataError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (1, "truncated or corrupt: more than 784 bytes of images, expected 1 x 28 x 28"),
        (2_000_000, r"says 2000000 x 28 x 28, \d+ MiB of \d+ KiB: at most 1024 MiB, or 100 times"),
        (2**32 - 1, "at most 1024 MiB, or 100 times"),
    ],
)
def test_a_small_file_cannot_fill_the_memory(tmp_path, images, says):
    """Of 300 MB of zeros in 300 KB, whatever its header says."""
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(struct.pack(">4B3I", 0, 0, 8, 3, images, 28, 28))
        for _ in range(300):
            file.write(bytes(10**6))
    command = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mebibytes, told = done.stdout.split(" ", 1)
    assert re.search(says, told) and int(mebibytes) < 100


def test_idx_refuses_unequal_counts(tmp_path):
    write_set(tmp_path, np.zeros((3, 5, 7)), np.zeros(2))
    with pytest.raises(DataError, match=r"images-idx3-ubyte holds 3 images, but .* 2 labels"):
        load("train", str(tmp_path), "idx")


def test_idx_refuses_an_empty_set(tmp_path):
    write_set(tmp_path, np.zeros((0, 5, 7)), np.zeros(0))
    with pytest.raises(DataError, match="is empty: 0 x 5 x 7 images by its header"):
        load("train", str(tmp_path), "idx")


def test_without_a_home_folder_the_root_stands_in():
    """As a user id without an account: nothing says where `~` is."""
    code = (
        "import os, pwd\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "from pathlib import Path\n"
        "from trainer.data import fashion_mnist\n"
        "print(Path.home(), fashion_mnist.cache_folder())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "/ /.cache/fashion-mnist\n", done.stderr


def test_idx_needs_a_folder():
    with pytest.raises(DataError, match=r"set data\.folder"):
        load("train", dataset="idx")


def test_unknown_names_list_the_known():
    with pytest.raises(DataError, match="dataset is 'mnist', expected one of fashion_mnist, "):
        find_or_download(dataset="mnist")


# -- searching -------------------------------------------------------------------------------


def test_places_are_searched_in_order(places):
    for place in (places.cache, places.debian, places.mxnet):
        copy_sample(place)
        assert find_or_download() == place


def test_other_compression_is_the_same_content(places):
    for path in copy_sample(places.mxnet).iterdir():
        path.write_bytes(gzip.compress(content_of(path), compresslevel=1))
    assert find_or_download() == places.mxnet


def test_half_a_cache_serves_its_half(places):
    copy_sample(places.mxnet)
    for name in FILES["test"]:
        (places.mxnet / f"{name}.gz").unlink()
    copy_sample(places.debian)
    (places.debian / "train-images-idx3-ubyte.gz").unlink()
    assert len(load("train")[0]) == 2000
    assert len(load("test")[0]) == 500


def test_bad_file_in_a_searched_place_is_reported_and_passed_by(places, caplog):
    bad = copy_sample(places.mxnet) / "t10k-images-idx3-ubyte.gz"
    bad.write_bytes(damaged("t10k-images-idx3-ubyte", "one bit flipped"))
    copy_sample(places.debian)
    assert find_or_download() == places.debian
    (message,) = caplog.messages
    assert message.startswith(str(bad)) and message.endswith("looking further")


def test_given_folder_is_the_only_place(places, tmp_path):
    copy_sample(places.debian)
    with pytest.raises(DataError, match=re.escape(f"folder {tmp_path / 'other'} holds no file")):
        load("train", str(tmp_path / "other"))


def test_without_data_three_ways_out_are_named_and_no_sample_is_used(places):
    with pytest.raises(DataError) as error:
        load("train")
    message = str(error.value)
    assert "\n" not in message
    assert "127.0.0.1:9: ConnectionError" in message
    for way in ("apt-get install dataset-fashion-mnist", "data.folder=", "fashion_mnist_sample"):
        assert way in message


def test_an_unusable_cache_names_ways_out(places, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write to .*data\.folder="):
        load("train")


# -- downloading -----------------------------------------------------------------------------


def test_download_passes_by_bad_mirrors(places, serve, tmp_path, monkeypatch):
    empty, asked_of_empty = serve(tmp_path / "nothing")
    wrong = copy_sample(tmp_path / "wrong")
    for name in NAMES:
        (wrong / f"{name}.gz").write_bytes(damaged(name, "one bit flipped"))
    corrupt, asked_of_corrupt = serve(wrong)
    good, asked_of_good = serve(SAMPLE_FOLDER)
    monkeypatch.setattr(fashion_mnist, "MIRRORS", (UNREACHABLE, empty, corrupt, good))

    assert find_or_download() == places.cache
    expected = [f"{name}.gz" for name in NAMES]
    assert asked_of_empty == asked_of_corrupt == asked_of_good == expected
    assert sorted(path.name for path in places.cache.glob("*ubyte*")) == sorted(expected)


def test_download_mends_a_cache(places, serve, monkeypatch):
    address, asked = serve(SAMPLE_FOLDER)
    monkeypatch.setattr(fashion_mnist, "MIRRORS", (address,))
    copy_sample(places.cache)
    (places.cache / "train-labels-idx1-ubyte.gz").write_bytes(b"cut")
    (places.cache / "t10k-images-idx3-ubyte.gz").unlink()
    assert len(load("train")[1]) == 2000
    assert asked == ["train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"]


def test_a_corrupt_download_never_appears(places, serve, tmp_path, monkeypatch):
    wrong = copy_sample(tmp_path / "wrong")
    (wrong / "train-images-idx3-ubyte.gz").write_bytes(b"captive portal")
    monkeypatch.setattr(fashion_mnist, "MIRRORS", (serve(wrong)[0],))
    with pytest.raises(DataError, match="begins with 63617074"):
        load("train")
    assert not (places.cache / "train-images-idx3-ubyte.gz").exists()


DOWNLOADER = """
import sys
from pathlib import Path
from trainer.data import fashion_mnist
fashion_mnist.SHA256["fashion_mnist"] = fashion_mnist.SAMPLE_SHA256
fashion_mnist.DEBIAN_FOLDER = Path("absent")
fashion_mnist.MIRRORS = (sys.argv[1],)
print(len(fashion_mnist.load("train")[0]))
"""


def test_one_process_of_a_node_downloads(places, serve):
    address, asked = serve(SAMPLE_FOLDER)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DOWNLOADER, address],
            cwd=str(SAMPLE_FOLDER.parents[1]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [rank.communicate(timeout=60) for rank in ranks]
    assert [out for out, _ in results] == ["2000\n"] * 3
    assert sorted(asked) == sorted(f"{name}.gz" for name in NAMES)
    assert sum("100%" in err for _, err in results) == 1  # the progress bar, of the one


def test_waiting_for_the_lock_ends(places, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "LOCK_SECONDS", 0.1)
    places.cache.mkdir(parents=True)
    with file_lock.held(places.cache / ".lock"), pytest.raises(
        DataError, match="another process has been downloading into"
    ):
        load("train")


# -- names of other sets -----------------------------------------------------------------------


def named(folder, prefix, end="", test="test"):
    """A set of one image under the names that EMNIST's files have."""
    for split in ("train", "test"):
        write_set(folder, np.full((1, 2, 2), 7), np.zeros(1), split)
        for name in FILES[split]:
            other = name.replace("t10k", test)
            (folder / name).rename(folder / f"{prefix}{other}{end}")


def test_files_are_found_under_emnists_names(tmp_path, capfd):
    named(tmp_path, "emnist-letters-")
    (tmp_path / "._emnist-letters-train-images-idx3-ubyte").write_bytes(b"Mac OS X")
    assert fashion_mnist.splits(str(tmp_path), "idx") == ["train", "test"]
    for split in ("train", "test"):
        assert load(split, str(tmp_path), "idx")[0].shape == (1, 2, 2)
    assert not capfd.readouterr().err


def test_files_of_mnists_own_names_come_first(tmp_path):
    named(tmp_path, "emnist-letters-")
    write_set(tmp_path, np.zeros((3, 2, 2)), np.zeros(3))
    assert len(load("train", str(tmp_path), "idx")[0]) == 3


def test_files_of_two_sets_are_refused_and_both_forms_of_one_are_not(tmp_path):
    named(tmp_path, "emnist-letters-")
    for path in list(tmp_path.iterdir()):  # as torchvision leaves them
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert load("test", str(tmp_path), "idx")[0].shape == (1, 2, 2)
    named(tmp_path, "emnist-digits-")
    with pytest.raises(DataError, match="holds emnist-digits-train-images-idx3-ubyte and emnist-l"):
        load("train", str(tmp_path), "idx")


def test_idx_files_that_are_not_read_are_told(tmp_path, capfd):
    write_set(tmp_path, np.zeros((3, 2, 2)), np.zeros(3))
    (tmp_path / "qmnist-extra-images-idx3-ubyte").write_bytes(b"")
    assert fashion_mnist.splits(str(tmp_path), "idx") == ["train"]
    said = "holds IDX files that are not read: qmnist-extra-images-idx3-ubyte\n"
    assert capfd.readouterr().err.endswith(said)


@pytest.mark.parametrize("dataset", ["idx", "folder", "records"])
def test_a_folder_that_must_not_be_listed_is_not_taken_for_an_empty_one(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)  # root may list all
    settings = Data(dataset, folder=str(tmp_path), image_size=8)
    with pytest.raises(DataError, match=f"^folder {tmp_path} cannot be read: Permission denied$"):
        input_pipeline.read(settings)
