"""A raw sample's files to the values that a codec takes.

Shape legend: C, F, H, W channels, frames or views, rows, columns; sound is 1×1×1×samples.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flagdit.data_pipelines.sound import read_wav
from flagdit.errors import DataError

Files = Mapping[str, memoryview]
Shape = tuple[int, int, int, int]


def read_frames(files: Files, shape: Shape) -> Tensor:
    """(3, F, H, W) fp32 pixels in [−1, 1], from one PNG with the frames below one another."""
    if "png" not in files:
        raise DataError("has no picture")
    _, frames, rows, columns = shape
    try:
        picture = Image.open(io.BytesIO(files["png"]), formats=("PNG",))
        if picture.size != (columns, frames * rows):  # known before any pixel is decoded
            raise DataError(f"its picture has {picture.width}×{picture.height} px, not as its index row says: {shape}")
        pixels = np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"its picture cannot be decoded ({error})") from error
    return torch.from_numpy(pixels).view(frames, rows, columns, 3).permute(3, 0, 1, 2).float() / 127.5 - 1


def read_sound(files: Files, shape: Shape) -> Tensor:
    """(1, 1, 1, N) fp32 samples in [−1, 1], from a WAV file."""
    if "wav" not in files:
        raise DataError("has no sound")
    samples, _ = read_wav(bytes(files["wav"]))
    return torch.from_numpy(samples)[None, None, None]


READERS: dict[str, Callable[[Files, Shape], Tensor]] = {
    "image": read_frames,
    "video": read_frames,
    "multiview": read_frames,
    "audio": read_sound,
}
"""Modality → how its raw files become values for its codec."""
