"""Which files of a folder are predicted, and in how much memory."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from trainer.config import Data
from trainer.data.idx_file import DataError
from trainer.inference import images


def picture(path, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), 200, np.uint8)).save(path)
    return str(path)


def test_hidden_folders_are_left_out_and_links_are_followed_once(tmp_path):
    kept, other = tmp_path / "photos", tmp_path / "other"
    shown = [picture(kept / "a.png"), picture(kept / "below" / "b.png")]
    for hidden in (".Trash-1000", "below/.ipynb_checkpoints"):
        picture(kept / hidden / "x.png")
    picture(other / "c.png")
    (kept / "more").symlink_to(other)
    (kept / "link.png").symlink_to(other / "c.png")
    (kept / "below" / "round").symlink_to(kept)
    (other / "back").symlink_to(other)
    shown += [str(kept / "link.png"), str(kept / "more" / "c.png")]
    assert images.read([str(kept)], (8, 8)).names == shown


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    found = images.read([str(tmp_path)], (8, 8))
    assert found.names == [str(tmp_path / "a.png")]
    assert [line.split("/")[-1] for line in found.skipped] == [
        "gone.png cannot be read: No such file or directory",
        "loop.png cannot be read: Too many levels of symbolic links",
    ]
    with pytest.raises(DataError, match="gone.png cannot be read"):
        images.read([str(tmp_path)], (8, 8), strict=True)


def test_images_are_held_once(tmp_path):
    for number in range(40):
        picture(tmp_path / f"{number:02}.png", 256)
    tracemalloc.start()
    found = images.read([str(tmp_path)], (256, 256))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.pixels.shape == (40, 256, 256) and (found.pixels == 200).all()
    assert peak < 1.5 * found.pixels.nbytes


@pytest.mark.parametrize("pictures", [None, Data("folder", folder=".", image_size=8, channels=1)])
def test_what_is_transparent_is_background_in_a_negative_too(tmp_path, pictures):
    pixels = np.zeros((8, 8, 2), np.uint8)
    pixels[:, :4, 1] = 255  # black on the left; on the right nothing
    Image.fromarray(pixels, "LA").save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png")
    chosen = pictures and dataclasses.replace(pictures, resize=8)
    half, whole = images.read([str(tmp_path)], (8, 8), invert=True, pictures=chosen).pixels
    assert (half[:, :4] == 255).all() and (half[:, 4:] == 0).all() and (whole == 255).all()
