"""Pictures of odd kinds come out as Pillow sees them; parts, sizes and colours as drawn."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.unit.data.pictures import encoded, smooth, tiff
from trainer.config import Data
from trainer.data.idx_file import DataError
from trainer.data.pictures import crop, decode
from trainer.data.pictures.decode import UnreadableError
from trainer.inference import images

PIXELS = smooth(40, 60)
GREY = np.asarray(Image.fromarray(PIXELS).convert("L"))


def decoded(content: bytes, channels: int = 3, part: int = 1) -> np.ndarray:
    about = decode.header(content)
    pixels = decode.decode(content, about, channels, part)
    height, width = pixels.shape[:2]
    assert (height, width) == (-(-about.height // part), -(-about.width // part))
    assert pixels.dtype == np.uint8 and pixels.shape[2:] == ((3,) if channels == 3 else ())
    return pixels


def near(found: np.ndarray, expected: np.ndarray, by: float = 3.0) -> bool:
    return found.shape == expected.shape and bool(
        np.abs(found.astype(float) - expected).mean() < by
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_colour_and_grey_of_each_format(kind, options):
    options = options if kind == "JPEG" else {}
    assert near(decoded(encoded(PIXELS, kind, **options)), PIXELS)
    assert near(decoded(encoded(PIXELS, kind, **options), channels=1), GREY)
    if kind != "WEBP":
        assert near(decoded(encoded(GREY, kind)), np.repeat(GREY[..., None], 3, axis=2))
        assert near(decoded(encoded(GREY, kind), channels=1), GREY)


def test_cmyk_palettes_and_16_bits():
    assert near(decoded(encoded(PIXELS, mode="CMYK")), PIXELS)
    few = Image.fromarray(PIXELS).quantize(16)
    for kind in ("PNG", "GIF"):
        assert (decoded(encoded(few, kind)) == np.asarray(few.convert("RGB"))).all()
    deep = GREY.astype(np.uint16) * 257
    assert (decoded(encoded(deep, "PNG"), channels=1) == GREY).all()
    assert (decoded(encoded(deep, "PNG"))[..., 1] == GREY).all()
    dots = Image.fromarray(PIXELS).convert("1")
    assert (decoded(encoded(dots, "PNG"), channels=1) == np.asarray(dots.convert("L"))).all()


RAMP = np.linspace(0, 1, 40 * 60).reshape(40, 60)


def in_grey(content: bytes) -> np.ndarray:
    """As it is trained on, which is as it is predicted from."""
    found = decoded(content, channels=1)
    assert (np.asarray(decode.by_pillow(content, "L")) == found).all()
    return found


def test_levels_of_12_and_16_bits_are_shown_in_all_their_range():
    full, twelve = (RAMP * 65535).astype("<u2"), (RAMP * 4095).astype("<u2")
    assert (in_grey(tiff(full, 16)) == full >> 8).all()
    assert (in_grey(tiff(full.astype("<u4"), 32)) == full >> 8).all()
    assert (in_grey(tiff(twelve, 12)) == twelve >> 4).all()
    assert (in_grey(tiff(full, 16, photometric=0)) == 255 - (full >> 8)).all()  # 0 is white
    assert (in_grey(tiff(np.zeros((4, 4), "<u2"), 16)) == 0).all()  # a slice with nothing in it
    deep = np.random.RandomState(0).randint(0, 65536, (20, 20, 3)).astype("<u2")
    _, png = cv2.imencode(".png", deep[..., ::-1])
    for content in (png.tobytes(), tiff(deep, 16, photometric=2)):
        assert (decoded(content) == deep >> 8).all()


TWELVE = (RAMP * 4095).astype("<u2")
IN_COLOUR = np.repeat(TWELVE[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("content", "levels"),
    [
        (tiff(TWELVE, 16), "0 to 4095"),
        (tiff(TWELVE.astype("<u4"), 32), "0 to 4095"),
        (tiff(TWELVE.astype("<i2") - 1024, 16), "-1024 to 3071"),
        (tiff((RAMP * 1e9).astype("<u4"), 32), "0 to 1000000000"),
        (tiff(IN_COLOUR, 16, photometric=2), "0 to 4095"),
        (cv2.imencode(".png", TWELVE)[1].tobytes(), "0 to 4095"),
        (cv2.imencode(".png", TWELVE // 16)[1].tobytes(), "0 to 255"),
        (cv2.imencode(".png", IN_COLOUR)[1].tobytes(), "0 to 4095"),
    ],
    ids=["12 in 16", "12 in 32", "signed", "32", "colour", "PNG", "8 in 16", "PNG in colour"],
)
def test_levels_that_would_come_out_black_or_cut_off_are_refused(content, levels, tmp_path):
    with pytest.raises(UnreadableError, match=f"^its levels are {levels}, of which 8 bits would"):
        decode.decode(content, decode.header(content), 3)
    (tmp_path / "scan").write_bytes(content)
    with pytest.raises(DataError, match=f"scan cannot be read: its levels are {levels}"):
        images.read([str(tmp_path / "scan")], (28, 28))


@pytest.mark.parametrize(("bands", "extra"), [(4, [0]), (5, [0, 0]), (6, [2, 0, 0])])
def test_bands_of_a_tiff_are_not_left_out_in_silence(bands, extra):
    content = tiff(np.zeros((4, 4, bands), np.uint8), 8, photometric=2, extra=extra)
    with pytest.raises(UnreadableError, match="bands that are neither colours nor opacity"):
        decode.header(content)


def test_what_is_transparent_is_black():
    opacity = np.zeros((40, 60, 1), np.uint8)
    opacity[:, 30:] = 255
    found = decoded(encoded(np.concatenate([PIXELS, opacity], axis=2), "PNG"))
    assert (found[:, :30] == 0).all() and (found[:, 30:] == PIXELS[:, 30:]).all()
    marked = encoded(np.full((4, 4), 7, np.uint8), "PNG", transparency=7)
    assert (decoded(marked, channels=1) == 0).all()


def behind_the_pixels(content: bytes, exif: bytes) -> bytes:
    """A PNG with its Exif after the pixels, as exiftool writes it."""
    chunk = b"eXIf" + exif[6:]
    chunk = struct.pack(">I", len(exif) - 6) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:-12] + chunk + content[-12:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, Exif behind"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_exif_turns_a_picture_upright(turned, kind):
    exif = Image.Exif()
    exif[0x0112] = turned
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(turned)  # Pillow's transpositions
    stored = Image.fromarray(PIXELS)
    if back is not None:
        stored = stored.transpose(Image.Transpose(back))
    if kind == "PNG, Exif behind":
        content = behind_the_pixels(encoded(stored, "PNG"), exif.tobytes())
    else:
        content = encoded(stored, kind, exif=exif)
    for found in (decoded(content), np.asarray(decode.by_pillow(content, "RGB"))):
        assert near(found, PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("type_", "value"), [(2, b"6\0"), (1, b"\6\0"), (7, b"\6\0"), (3, b"\0\0"), (3, b"\11\0")]
)
def test_an_orientation_that_is_none_is_not_obeyed(kind, type_, value):
    count = len(value) // (2 if type_ == 3 else 1)
    entry = struct.pack("<HHI4s", 0x0112, type_, count, value)
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 1) + entry + bytes(4)
    content = encoded(PIXELS, kind, exif=exif)
    for found in (decoded(content), np.asarray(decode.by_pillow(content, "RGB"))):
        assert near(found, PIXELS)


def test_exif_that_is_damaged_is_not_obeyed():
    content = encoded(PIXELS, "JPEG", dpi=(72, 72), exif=b"Exif\0\0no TIFF at all")
    for found in (decoded(content), np.asarray(decode.by_pillow(content, "RGB"))):
        assert near(found, PIXELS)


@pytest.mark.parametrize("part", [2, 4, 8])
def test_a_part_of_the_size_shows_the_same(part):
    large = smooth(333, 201)
    found = decoded(encoded(large), part=part)
    assert near(found, np.asarray(Image.fromarray(large).resize(found.shape[1::-1])), 7)


def test_parts_are_never_smaller_than_needed():
    about = decode.header(encoded(PIXELS))
    assert [decode.part_for(about, scale) for scale in (0.3, 1.9, 2, 3.9, 4, 8, 30)] == [
        *(1, 1, 2, 2, 4, 8, 8)
    ]
    assert decode.part_for(decode.header(encoded(PIXELS, "PNG")), 9) == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_file_cut_short_anywhere_is_refused_in_one_line(kind):
    content = encoded(PIXELS, kind)
    for end in [*range(0, len(content) - 20, 37), 1, 2, 3, 10]:
        with pytest.raises(UnreadableError) as raised:
            decode.decode(content[:end], decode.header(content[:end]), 3)
        assert str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_picture_is_refused():
    for content in (b"", b"\xff\xd8\xff", b"not a picture" * 50, b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(UnreadableError):
            decode.decode(content, decode.header(content), 3)
    with pytest.raises(UnreadableError, match="mode F"):
        content = encoded(GREY.astype(np.float32), "TIFF")
        decode.decode(content, decode.header(content), 3)


# ---------------------------------------------------------------- what strangers send


def with_size(content: bytes, width: int, height: int) -> bytes:
    """The small GIF, JPEG, PNG or BMP ``content`` with another size in its header."""
    if content[:2] == b"\xff\xd8":
        place = content.index(b"\xff\xc0") + 5
        return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]
    if content[:4] == b"GIF8":
        size = struct.pack("<HH", width, height)
        frame = content.index(b"\x2c\0\0\0\0") + 5
        return content[:6] + size + content[10:frame] + size + content[frame + 4 :]
    if content[:2] == b"BM":
        return content[:18] + struct.pack("<II", width, height) + content[26:]
    chunk = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "P"])
@pytest.mark.parametrize(("width", "height"), [(12_300, 12_300), (50_000, 50_000)])
def test_pictures_of_too_many_pixels_are_refused_by_their_headers(
    kind: str, mode: str, width: int, height: int, tmp_path: Path
) -> None:
    image = Image.fromarray(PIXELS).convert("RGB" if kind == "JPEG" else mode)
    content = with_size(encoded(image, kind), width, height)
    with pytest.raises(
        UnreadableError, match=r"more than .*150 million .*make it smaller"
    ) as error:
        decode.header(content)
    assert "\n" not in str(error.value)
    (tmp_path / "huge").write_bytes(content)
    with pytest.raises(DataError, match="150 million"):
        images.read([str(tmp_path / "huge")], (28, 28))


def test_photographs_of_a_hundred_megapixels_are_not() -> None:
    content = with_size(encoded(PIXELS, "PNG"), 12_000, 9_000)
    assert decode.header(content).width == 12_000


def test_no_program_is_run_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has PostScript drawn by Ghostscript, whatever the file is called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    content = encoded(PIXELS, "EPS")
    with pytest.raises(UnreadableError, match="no picture"):
        decode.decode(content, decode.header(content), 3)
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(DataError, match="no picture that Pillow knows"):
        images.read([str(tmp_path / "photo.png")], (28, 28))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- parts


def settings(**values) -> Data:
    return Data(dataset="folder", folder="f", **{"image_size": 16, **values})


def test_evaluation_takes_the_middle_of_the_shorter_side():
    box = crop.middle(500, 375, settings(image_size=224, resize=256))
    assert box.width == box.height == pytest.approx(375 * 224 / 256)
    assert box.left + box.width / 2 == 250 and box.top + box.height / 2 == 187.5
    assert crop.middle(10, 20, settings()).width == pytest.approx(8.75)
    whole = crop.middle(30, 30, settings(resize=16))
    assert whole == (0, 0, 30, 30)


def test_random_parts_have_the_areas_and_aspects_that_were_asked_for():
    draws = np.random.RandomState(0).rand(2000, crop.DRAWS)
    boxes = np.array([crop.at_random(90, 60, settings(crop_area=(0.1, 0.8)), d) for d in draws])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 90 + 1e-9).all() and (top + height <= 60 + 1e-9).all()
    share, aspect = width * height / (90 * 60), width / height
    assert 0.1 <= share.min() < 0.12 and 0.7 < share.max() <= 0.8
    assert aspect.min() < 0.8 and aspect.max() > 1.3
    assert (aspect < 4 / 3 + 1e-9).all() and (aspect > 3 / 4 - 1e-9).all()
    assert np.corrcoef(share, width)[0, 1] > 0.2


def test_the_picture_is_as_gluons_resize_and_crop_make_it():
    large = smooth(120, 180)
    found = crop.cut(encoded(large, "PNG"), settings(image_size=56, resize=64))
    expected = Image.fromarray(large).resize((96, 64), Image.Resampling.BILINEAR)
    assert near(found, np.asarray(expected.crop((20, 4, 76, 60))), 4)
    for kind in ("JPEG", "PNG"):  # the JPEG is decoded at a part of its size
        huge = smooth(900, 1100)
        found = crop.cut(encoded(huge, kind), settings(image_size=56, resize=64))
        small = Image.fromarray(huge).resize((78, 64), Image.Resampling.BOX)
        assert near(found, np.asarray(small.crop((11, 4, 67, 60))), 3)


def test_one_pixel_and_thin_pictures_are_no_problem():
    for shape in ((1, 1), (1, 300), (300, 1), (2, 7)):
        content = encoded(smooth(*shape))
        for draw in ((), np.random.RandomState(0).rand(crop.DRAWS)):
            assert crop.cut(content, settings(random_crop=True), draw).shape == (16, 16, 3)
            assert crop.cut(content, settings(channels=1), draw).shape == (16, 16)


def test_colours_change_by_up_to_the_share_asked_for():
    content = encoded(np.full((20, 20, 3), 100, np.uint8), "PNG")
    draw = np.full(crop.DRAWS, 0.5)
    assert (crop.cut(content, settings(color_jitter=0.4), draw) == 100).all()
    draw[-3] = 1.0  # brightness; contrast and saturation change nothing in plain grey
    draw[-2:] = 0.0
    assert np.abs(crop.cut(content, settings(color_jitter=0.4), draw).astype(int) - 140).max() <= 1
    colour = encoded(PIXELS, "PNG")
    draw = np.full(crop.DRAWS, 0.5)
    draw[-1] = 0.0
    plain = crop.cut(colour, settings()).astype(float)
    pale = crop.cut(colour, settings(color_jitter=1.0), draw).astype(float)
    assert np.ptp(pale, axis=2).max() <= 1 < np.ptp(plain, axis=2).max()
    draw[-2:] = (0.0, 0.5)
    flat = crop.cut(colour, settings(color_jitter=1.0), draw)
    assert np.ptp(flat) <= 1
