"""Pixels to picture files and back.

Shape legend: C = 3 colours, F frames or views, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flagdit.data_pipelines.pictures import decode_picture, resize_cover
from flagdit.errors import DataError, RecipeError

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
SMALL = 128
"""Pixels of a side below which pictures are enlarged on a sheet, so that a person sees something."""
CAPTION_HEIGHT, CAPTION_WIDTH, CAPTION_POINTS = 16, 180, 10


def to_image(pixels_CFHW: Tensor) -> Image.Image:
    """(3, F, H, W) in [−1, 1] → an RGB picture; frames stand side by side."""
    c, f, h, w = pixels_CFHW.shape
    row_CHW = pixels_CFHW.permute(0, 2, 1, 3).reshape(c, h, f * w)
    levels = ((row_CHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def load_image(file: Path, size: tuple[int, int] | None = None) -> Tensor:
    """A picture file → pixels (3, 1, H, W) in [−1, 1]; transparency becomes white.

    Args:
        file: PNG, JPEG or WebP.
        size: (width, height): the picture is scaled to cover it and cut around the centre. None: its own.

    Raises:
        RecipeError: no such file, or not a picture.
    """
    picture = load_picture(file)
    return to_pixels(resize_cover(picture, *size) if size else picture)


def load_picture(file: Path) -> Image.Image:
    """A picture file → RGB.

    Raises:
        RecipeError: no such file, or not a picture.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"the picture cannot be read: {error.strerror}", where=str(file)) from error
    return picture_of(content, str(file))


def picture_of(content: bytes, name: str) -> Image.Image:
    """`load_picture` for what is in a file; `name` stands in errors."""
    try:
        return decode_picture(content)
    except DataError as error:
        raise RecipeError(f"the picture cannot be read: {error}", where=name) from error


def to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture → (3, 1, H, W) in [−1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, None].float() / 127.5 - 1


def grid(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    zoom: int = 1,
    gap: int = 2,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures on a white sheet, row by row, each in the middle of a cell of the largest size.

    Args:
        images: at least one.
        columns: pictures in a row; None: as square as it gets.
        zoom: pixels are repeated so many times, without smoothing.
        gap: white pixels between pictures, after zooming.
        captions: a line under each picture, cut to the cell's width, which is then at least CAPTION_WIDTH.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = (zoom * max(sizes) for sizes in zip(*(image.size for image in images), strict=True))
    cell_width = max(width, CAPTION_WIDTH) if captions else width
    cell_height = height + CAPTION_HEIGHT if captions else height
    sheet = Image.new("RGB", (columns * (cell_width + gap) - gap, rows * (cell_height + gap) - gap), "white")
    for i, image in enumerate(images):
        enlarged = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
        x, y = i % columns * (cell_width + gap), i // columns * (cell_height + gap)
        sheet.paste(enlarged, (x + (cell_width - enlarged.width) // 2, y + (height - enlarged.height) // 2))
        if captions:
            _write(sheet, captions[i], x, y + height, cell_width)
    return sheet


def zoom_for(images: Sequence[Image.Image]) -> int:
    """How often to repeat the pixels of small pictures on a sheet."""
    return max(1, SMALL // max(max(image.size) for image in images))


def save_image(image: Image.Image, file: Path) -> None:
    """Writes a picture file, making its folder.

    Raises:
        RecipeError: the name has another ending than FORMATS, or the file cannot be written.
    """
    check_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError(
            f"the picture cannot be written: {why}", where=str(file), fix="Give another --out."
        ) from error


def check_name(file: Path) -> None:
    """Whether a picture can be saved under this name.

    Raises:
        RecipeError: it has another ending than FORMATS.
    """
    if file.suffix.lower() not in FORMATS:
        raise RecipeError(f"{file} is not a picture file", where="--out", fix=f"End it in {', '.join(FORMATS)}.")


def _write(sheet: Image.Image, text: str, x: int, y: int, width: int) -> None:
    """One centred line, cut with … where it is too long."""
    font, draw = _font(), ImageDraw.Draw(sheet)
    text = " ".join(text.split())
    shown = text
    while draw.textlength(shown, font) > width and len(shown) > 1:
        text = text[:-1]
        shown = text.rstrip() + "…"
    draw.text((x + (width - draw.textlength(shown, font)) / 2, y + 2), shown, fill="black", font=font)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Pillow's own font knows little beyond ASCII."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", CAPTION_POINTS)
