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

from flagdit.codecs.latents import Codec
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.pictures import read_jpeg
from flagdit.data_pipelines.sound import read_wav
from flagdit.errors import DataError

Files = Mapping[str, memoryview]
Shape = tuple[int, int, int, int]


def read_frames(files: Files, shape: Shape) -> Tensor:
    """(3, F, H, W) fp32 pixels in [−1, 1], from one PNG with the frames below one another, or from a JPEG of any size,
    which is cut and resized."""
    _, frames, rows, columns = shape
    if "jpg" in files and frames == 1:
        pixels = np.array(read_jpeg(bytes(files["jpg"]), columns, rows))
    elif "png" in files:
        pixels = _strip(files["png"], columns, frames * rows)
    else:
        raise DataError("has no picture")
    levels_CFHW = torch.from_numpy(pixels).view(frames, rows, columns, 3).permute(3, 0, 1, 2)
    return levels_CFHW.float().div_(127.5).sub_(1)


def _strip(data: memoryview, width: int, height: int) -> np.ndarray:
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
        if picture.size != (width, height):  # known before any pixel is decoded
            raise DataError(f"its picture has {picture.width}×{picture.height} px; its index row says {width}×{height}")
        return np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"its picture cannot be decoded ({error})") from error


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


def read_values(raw: Dataset, sample_id: int, members: Files | None = None) -> Tensor:
    """What the codec of a raw sample's modality takes.

    Args:
        members: the sample's files, where they have been read already.

    Raises:
        DataError: unreadable, or not as its index row says.
    """
    shape = raw.shape(sample_id)
    values_CFHW = READERS[raw.modality](raw.members(sample_id) if members is None else members, shape)
    if tuple(values_CFHW.shape) != shape:
        raise DataError(f"decodes to {tuple(values_CFHW.shape)}; its index row says {shape}")
    return values_CFHW


def check_sizes(raw: Dataset, codec: Codec) -> None:
    """Whether the codec takes every size of a raw data set.

    Raises:
        DataError: not so; names sizes and the multiple that fits.
    """
    wrong = [
        f"{shape[3]}×{shape[2]} px ({n})"
        for shape, n in raw.shapes
        if shape[2] % codec.factor or shape[3] % codec.factor
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} of its sizes are not multiples of {codec.factor} px, one latent: {', '.join(wrong[:5])}",
            where=str(raw.path),
            fix=f"Build it with --multiple {codec.factor} (better: {codec.factor} times model.patch_size).",
        )
