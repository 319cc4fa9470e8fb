"""Files of any modality as `edit` takes them: pictures, strips of views, clips, sounds; and masks of them.

Shape legend: C channels, F frames or views, H rows, W columns; a sound is 1×1×1×N samples.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flagdit.codecs.audio import MelCodec
from flagdit.data_pipelines import clips, sound
from flagdit.data_pipelines.pictures import resize_cover
from flagdit.errors import DataError, RecipeError
from flagdit.generate.images import FORMATS, load_picture, to_pixels
from flagdit.generate.media import CLIP_FPS
from flagdit.generate.pipeline import Pipeline

MODALITIES_OF = {
    "picture": ("image", "multiview", "video"),
    "clip": ("video", "multiview"),
    "sound": ("audio",),
}


def modality_for(file: Path, modalities: Collection[str]) -> str:
    """What a file most likely is, of the modalities of a model: by its ending.

    Raises:
        RecipeError: an ending that is not read, or a kind of file that the model knows nothing of.
    """
    kind = _kind(file)
    for modality in MODALITIES_OF[kind]:
        if modality in modalities:
            return modality
    raise RecipeError(
        f"{file} is a {kind}, and this model makes {', '.join(modalities)}", fix="Give a file of such a kind."
    )


def load_sample(
    file: Path,
    pipeline: Pipeline,
    modality: str,
    *,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    seconds: float | None = None,
) -> Tensor:
    """A file → a sample that the model can make.

    Args:
        file: a picture, a clip or a sound.
        pipeline: of the modality; its codec and patches say which sizes there are.
        modality: what the file holds.
        size: (width, height) of a frame, which is scaled to cover it and cut around the centre. None: its own, cut to
            sides that the model can make.
        frames: the first so many frames of a clip, CLIP_FPS a second; or how many views stand in a picture, side by
            side or one below the other. None: all of a clip, one of a picture.
        seconds: the first so many of a sound; None: all. Silence fills the last column of tokens.

    Returns:
        Pixels (3, F, H, W) or a waveform (1, 1, 1, N), in [−1, 1].

    Raises:
        RecipeError: a file that cannot be read, or is not of the modality, or is too short.
    """
    kind = _kind(file)
    if not file.is_file():
        raise RecipeError("no such file", where=str(file))
    if modality not in MODALITIES_OF[kind]:
        raise RecipeError(f"a {kind} is not of modality {modality}", where=str(file))
    limits = pipeline.recipe.limits
    multiple = pipeline.model.cfg.patch_size * pipeline.codec.factor
    try:
        if kind == "sound":
            assert isinstance(pipeline.codec, MelCodec)
            rate = pipeline.recipe.audio.sample_rate
            samples_N = sound.decode_sound(file, rate, limits)[: None if seconds is None else round(seconds * rate)]
            samples_N = np.pad(samples_N, (0, -len(samples_N) % (pipeline.codec.step * pipeline.model.cfg.patch_size)))
            return torch.from_numpy(samples_N)[None, None, None]
        if kind == "clip":
            pictures = list(islice(clips.decode_frames(file, CLIP_FPS, limits), frames))
        else:
            pictures = _cut(load_picture(file), frames or 1)
    except DataError as error:
        raise RecipeError(f"the {kind} cannot be read: {error}", where=str(file)) from error
    if len(pictures) < (frames or 1):
        raise RecipeError(
            f"{len(pictures)} frames at {CLIP_FPS} a second are fewer than {frames}",
            where=str(file),
            fix="Give fewer --frames.",
        )
    width, height = size or (max(side // multiple, 1) * multiple for side in pictures[0].size)
    return torch.cat([to_pixels(resize_cover(picture, width, height)) for picture in pictures], 1)


def load_mask(file: Path, pipeline: Pipeline, modality: str, sample_CFHW: Tensor) -> Tensor:
    """A picture, strip of views or clip → (1 or F, H, W) bool for a sample: True where it is brighter than half.

    Raises:
        RecipeError: a file that cannot be read, or a mask of a sound.
    """
    if modality == "audio":
        raise RecipeError("a sound has no mask in a file", where=str(file), fix="Give --between FROM TO, in seconds.")
    _, frames, height, width = sample_CFHW.shape
    one_for_all = modality != "multiview" and _kind(file) == "picture"
    mask = load_sample(file, pipeline, modality, size=(width, height), frames=1 if one_for_all else frames)
    return mask.mean(0) > 0


def between(sample_CFHW: Tensor, modality: str, rate: int, begin: float, end: float) -> Tensor:
    """(F, H, W) bool: True for frames of a clip, or samples of a sound, from `begin` until `end` seconds.

    Args:
        rate: samples of sound per second.

    Raises:
        RecipeError: something without time, or no frame or sample between these seconds.
    """
    _, frames, height, width = sample_CFHW.shape
    if modality == "video":
        time, length = torch.arange(frames)[:, None, None] / CLIP_FPS, frames / CLIP_FPS
    elif modality == "audio":
        time, length = torch.arange(width)[None, None] / rate, width / rate
    else:
        raise RecipeError(f"a sample of modality {modality} has no seconds", where="--between", fix="Give --mask.")
    mask = (time >= begin) & (time < end)
    if not mask.any():
        raise RecipeError(f"nothing is between {begin:g} and {end:g} of {length:g} seconds", where="--between")
    return mask.expand(frames, height, width)


def _kind(file: Path) -> str:
    ending = file.suffix.lower()
    for kind, endings in (("picture", FORMATS), ("clip", clips.READ), ("sound", sound.READ)):
        if ending in endings:
            return kind
    known = [*FORMATS, *sorted(clips.READ), *sorted(sound.READ)]
    raise RecipeError(f"{file} is no picture, clip or sound that is read", fix=f"Those end in {', '.join(known)}.")


def _cut(strip: Image.Image, count: int) -> list[Image.Image]:
    """The views of a picture that has them side by side, or one below the other where it is a high one."""
    along = 0 if strip.width >= strip.height else 1
    side, rest = divmod(strip.size[along], count)
    if rest:
        raise DataError(f"{strip.width}×{strip.height} px are not {count} views of one size; see --frames")
    corners = [(i * side, 0) if along == 0 else (0, i * side) for i in range(count)]
    width, height = (side, strip.height) if along == 0 else (strip.width, side)
    return [strip.crop((x, y, x + width, y + height)) for x, y in corners]
