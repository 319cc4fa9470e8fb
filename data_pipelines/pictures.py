"""Pictures for sources: decoding within limits, sizes that a model can cut, resizing, PNG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable

from PIL import Image, ImageOps

from flagdit.errors import DataError, RecipeError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 1 << 26
DRAFT = 2.0  # a JPEG is decoded at twice the wanted size or more: resampling from less would show
ORIENTATION = 0x0112
JPEG = b"\xff\xd8\xff"  # how such a file begins
LARGEST_MULTIPLE, SMALLEST_MULTIPLE = 16, 4


def default_multiple(side: int) -> int:
    """The multiple, in pixels, that rows and columns are held to when the user names none.

    An eighth of the side as a power of two, from 4 (small pictures without an autoencoder) to 16 (an 8× autoencoder and
    patches of 2), so that a small budget still has several aspect ratios.
    """
    eighth = 1 << max(side // 8, 1).bit_length() - 1
    return min(max(eighth, SMALLEST_MULTIPLE), LARGEST_MULTIPLE)


def check_size(side: int, multiple: int) -> int:
    """The multiple to use: the given one, or for 0 the default.

    Raises:
        RecipeError: the side is not a multiple of it; names sides that are.
    """
    multiple = multiple or default_multiple(side)
    if side < multiple or side % multiple:
        near = [n for n in (side // multiple * multiple, (side // multiple + 1) * multiple) if n]
        raise RecipeError(
            f"--size {side} is not a multiple of {multiple} px",
            fix=f"Try {' or '.join(map(str, near))}, or another --multiple (codec factor times model.patch_size).",
        )
    return multiple


def fit_size(width: int, height: int, side: int, multiple: int) -> tuple[int, int]:
    """Columns and rows for a picture: multiples of `multiple`, at most side² pixels, never more than the picture has.

    Of the sizes around the exact one it takes the one nearest in aspect ratio.

    Raises:
        DataError: the picture is smaller than one multiple.
    """
    if min(width, height) < multiple:
        raise DataError(f"{width}×{height} px is smaller than {multiple} px")
    scale = min(1.0, side / math.sqrt(width * height))

    def around(length: int) -> set[int]:
        steps = length * scale / multiple
        return {max(1, math.floor(steps)) * multiple, max(1, math.ceil(steps)) * multiple}

    sizes = [
        (w, h) for w in around(width) for h in around(height) if w <= width and h <= height and w * h <= side * side
    ]
    if not sizes:  # a strip: one side is a single multiple, the other as long as the budget allows
        longest = min(side * side // multiple, max(width, height)) // multiple * multiple
        sizes = [(longest, multiple) if width > height else (multiple, longest)]
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1] * height / width)), -s[0] * s[1], s))


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture; transparency becomes white, of an animation the first frame is taken.

    Raises:
        DataError: not a whole PNG, JPEG or WebP picture, or more pixels than allowed (known before any are decoded).
    """
    return decode_at(data, None, max_pixels)[0]


def decode_at(
    data: bytes, target: Callable[[int, int], tuple[int, int]] | None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """`decode_picture`, at a lower resolution where the file allows it and `target` has use for no more.

    Args:
        target: (columns, rows) of the upright file → those that are wanted; None: all.

    Returns:
        The picture, at least DRAFT times as large as wanted, and the upright file's columns and rows.

    Raises:
        DataError: see `decode_picture`; and whatever `target` raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"more than the {max_pixels} pixels allowed") from error
    except Exception as error:
        raise DataError(f"not a PNG, JPEG or WebP picture ({type(error).__name__})") from error
    if picture.width * picture.height > max_pixels:
        raise DataError(f"{picture.width}×{picture.height} px is more than the {max_pixels} pixels allowed")
    drafted = None
    if target is not None and picture.format in ("JPEG", "MPO"):  # MPO: what telephones make of JPEG
        lies = picture.getexif().get(ORIENTATION, 1) >= 5  # on its side
        width, height = drafted = picture.size[::-1] if lies else picture.size
        wanted = target(width, height)
        scale = max(wanted[0] / width, wanted[1] / height) * DRAFT
        picture.draft(None, (math.ceil(picture.width * scale), math.ceil(picture.height * scale)))
    try:  # decoders of hostile files raise anything; whatever it is becomes the reason in the ledger
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        upright = on_white(picture)
        return upright, drafted or upright.size
    except Exception as error:
        raise DataError(f"cannot be decoded ({error})") from error


def on_white(picture: Image.Image) -> Image.Image:
    """RGB; transparent parts become white and 16-bit grey keeps its upper 8 bits."""
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy an RGB picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def resize_cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled so that it covers width×height, then cut around the centre."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def fitted(
    data: bytes, size: int, multiple: int, max_pixels: int, keep_jpeg: bool = False
) -> tuple[dict[str, bytes], int, int, list[int]]:
    """A picture file as a sample's file, of a size that a model can cut.

    A JPEG much larger than that is decoded at half, quarter or eighth of its size, which its format allows at a
    fraction of the cost; at least twice the final size is left for the resampling to work on.

    Args:
        size, multiple: as in `fit_size`.
        keep_jpeg: a JPEG stays the file that it is, for `read_jpeg`; it is only looked through, at an eighth of its
            size.

    Returns:
        File ending → file (a PNG, or the JPEG), columns and rows of what it gives, and those of the file.

    Raises:
        DataError: see `decode_picture` and `fit_size`.
    """
    if keep_jpeg and data.startswith(JPEG):
        _, before = decode_at(data, lambda w, h: (1, 1), max_pixels)
        return {"jpg": data}, *fit_size(*before, size, multiple), list(before)
    picture, before = decode_at(data, lambda w, h: fit_size(w, h, size, multiple), max_pixels)
    width, height = fit_size(*before, size, multiple)
    return {"png": png(resize_cover(picture, width, height))}, width, height, list(before)


def read_jpeg(data: bytes, width: int, height: int) -> Image.Image:
    """A JPEG as a picture of width×height, as `fitted` would have made it.

    Raises:
        DataError: see `decode_picture`.
    """
    return resize_cover(decode_at(data, lambda w, h: (width, height))[0], width, height)


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
