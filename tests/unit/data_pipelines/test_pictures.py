"""Picture sizes, limits, modes and resizing."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flagdit.data_pipelines.pictures import (
    check_size,
    decode_at,
    decode_picture,
    default_multiple,
    fit_size,
    fitted,
    png,
    read_jpeg,
    resize_cover,
)
from flagdit.errors import DataError, RecipeError


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "side", "multiple", "expected"),
    [
        (100, 100, 24, 4, (24, 24)),
        (300, 200, 24, 4, (28, 20)),
        (200, 300, 24, 4, (20, 28)),
        (1920, 1080, 256, 16, (336, 192)),
        (1080, 1920, 256, 16, (192, 336)),
        (30, 20, 256, 4, (28, 20)),
        (4000, 4, 24, 4, (144, 4)),
        (4, 4000, 24, 4, (4, 144)),
        (4, 4, 24, 4, (4, 4)),
    ],
)
def test_sizes(width: int, height: int, side: int, multiple: int, expected: tuple[int, int]):
    assert fit_size(width, height, side, multiple) == expected


def test_every_size_keeps_its_promises():
    rng = np.random.default_rng(0)
    for _ in range(500):
        multiple = int(rng.choice([4, 8, 16]))
        width, height = (int(n) for n in rng.integers(multiple, 3000, 2))
        side = multiple * int(rng.integers(2, 30))
        w, h = fit_size(width, height, side, multiple)
        assert w % multiple == h % multiple == 0 and 0 < w * h <= side * side
        assert w <= width and h <= height
        if max(width / height, height / width) < 2 and min(w, h) >= 4 * multiple:
            assert abs(np.log(w / h * height / width)) < 0.25


def test_too_small_a_picture():
    with pytest.raises(DataError, match="smaller than 8 px"):
        fit_size(100, 7, 32, 8)


def test_multiples():
    assert [default_multiple(n) for n in (8, 24, 32, 64, 128, 256, 1024)] == [4, 4, 4, 8, 16, 16, 16]
    assert check_size(24, 0) == 4 and check_size(48, 24) == 24
    with pytest.raises(RecipeError, match=r"--size 26 is not a multiple of 4 px.*Try 24 or 28"):
        check_size(26, 0)
    with pytest.raises(RecipeError, match="Try 16"):
        check_size(8, 16)


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    for data in (encoded(clear), encoded(clear, "WEBP", lossless=True), encoded(clear.convert("LA"))):
        assert np.asarray(decode_picture(data)).min() == 255
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([n for i in range(256) for n in (i, i, i)])
    assert np.asarray(decode_picture(encoded(palette, transparency=3))).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16"])
def test_modes_become_rgb(mode: str):
    grey = Image.fromarray(np.full((4, 6), 128, np.uint8))
    picture = Image.fromarray(np.full((4, 6), 128 * 256, np.uint16)) if mode == "I;16" else grey.convert(mode)
    got = decode_picture(
        encoded(picture, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100} if mode == "CMYK" else {}))
    )
    assert got.mode == "RGB" and got.size == (6, 4)
    if mode != "1":
        assert abs(np.asarray(got).astype(int) - 128).max() <= 3


def test_photographs_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_picture(encoded(Image.new("RGB", (10, 20)), "JPEG", exif=exif)).size == (20, 10)


def bomb(side: int) -> bytes:
    """A PNG of side² pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9000, 12_000, 60_000])
def test_bombs_are_known_by_their_header(side: int, recwarn: pytest.WarningsRecorder):
    with pytest.raises(DataError, match="pixels allowed"):
        decode_picture(bomb(side))
    assert not recwarn.list


def test_own_limit():
    data = encoded(Image.new("RGB", (20, 20)))
    assert decode_picture(data, max_pixels=400).size == (20, 20)
    with pytest.raises(DataError, match="20×20 px is more than the 399"):
        decode_picture(data, max_pixels=399)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        encoded(Image.effect_noise((64, 64), 50))[:-400],
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-400],
        encoded(Image.new("RGB", (8, 8)), "GIF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "gif", "postscript"],
)
def test_broken_and_foreign_files_are_refused(data: bytes):
    with pytest.raises(DataError):
        decode_picture(data)


def test_resize_keeps_the_centre():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    assert np.asarray(resize_cover(Image.fromarray(pixels), 20, 20)).min() > 200
    assert Image.open(io.BytesIO(png(Image.new("RGB", (3, 2))))).size == (3, 2)


def smooth(width: int, height: int) -> Image.Image:
    """Like a photograph: soft areas, and some grain."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 80, width // 80, 3), np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("format", ["JPEG", "MPO"])
def test_large_jpegs_are_decoded_at_a_lower_resolution_and_come_out_the_same(format: str, lies: bool):
    exif = Image.Exif()
    exif[0x0112] = 6 if lies else 1
    picture = smooth(1024, 768)
    more = {"save_all": True, "append_images": [picture]} if format == "MPO" else {}
    data = encoded(picture, format, quality=90, exif=exif, **more)
    wanted = (192, 256) if lies else (256, 192)
    drafted, before = decode_at(data, lambda w, h: wanted)
    assert before == ((768, 1024) if lies else (1024, 768)), "upright, and of the file"
    assert drafted.size == tuple(2 * n for n in wanted), "half: twice what is wanted is left"
    whole = np.asarray(resize_cover(decode_picture(data), *wanted)).astype(float)
    error = ((np.asarray(read_jpeg(data, *wanted)) - whole) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 40
    kept, width, height, _ = fitted(data, 224, 16, 1 << 26, keep_jpeg=True)
    assert kept == {"jpg": data} and (width, height) == wanted
    assert Image.open(io.BytesIO(fitted(data, 224, 16, 1 << 26)[0]["png"])).size == wanted
