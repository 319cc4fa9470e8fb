"""Pixels to picture files.

Shape legend: C = 3 colours, F frames or views, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def to_image(pixels_CFHW: Tensor) -> Image.Image:
    """(3, F, H, W) in [−1, 1] → an RGB picture; frames stand side by side."""
    c, f, h, w = pixels_CFHW.shape
    row_CHW = pixels_CFHW.permute(0, 2, 1, 3).reshape(c, h, f * w)
    levels = ((row_CHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def grid(images: Sequence[Image.Image], *, columns: int | None = None, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Pictures on a white sheet, row by row, each in a cell of the largest size.

    Args:
        images: at least one.
        columns: pictures in a row; None: as square as it gets.
        zoom: pixels are repeated so many times, without smoothing.
        gap: white pixels between pictures, after zooming.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = (zoom * max(sizes) for sizes in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        enlarged = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
        x, y = i % columns * (width + gap), i // columns * (height + gap)
        sheet.paste(enlarged, (x + (width - enlarged.width) // 2, y + (height - enlarged.height) // 2))
    return sheet
