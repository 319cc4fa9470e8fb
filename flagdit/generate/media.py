"""Samples of any modality to files: pictures and view sheets, clips, sounds.

Shape legend: C channels, F frames or views, H rows, W columns; sound is 1×1×1×N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from flagdit.data_pipelines.sound import wav
from flagdit.errors import RecipeError
from flagdit.generate.images import FORMATS, grid, save_image, to_image, zoom_for

CLIPS = (".mp4", ".gif")
ENDINGS: dict[str, tuple[str, ...]] = {
    "image": FORMATS,
    "multiview": (*FORMATS, *CLIPS),
    "video": (*CLIPS, ".webp"),
    "audio": (".wav",),
}
DEFAULT_NAMES = {"image": "grid.png", "multiview": "views.png", "video": "clip.mp4", "audio": "sound.wav"}
CLIP_FPS = 8


def check_any_name(file: Path | None) -> None:
    """Whether samples of any modality can be saved under this name.

    Raises:
        RecipeError: its ending is none of ENDINGS.
    """
    known = list(dict.fromkeys(ending for endings in ENDINGS.values() for ending in endings))
    if file is not None and file.suffix.lower() not in known:
        raise RecipeError(
            f"{file} is not a picture file, clip or sound", where="--out", fix=f"End it in {', '.join(known)}."
        )


def check_media_name(file: Path, modality: str) -> None:
    """Whether samples of a modality can be saved under this name.

    Raises:
        RecipeError: it has another ending than ENDINGS.
    """
    if file.suffix.lower() not in ENDINGS[modality]:
        raise RecipeError(
            f"{file} is no file for {modality}", where="--out", fix=f"End it in {', '.join(ENDINGS[modality])}."
        )


def save_samples(
    samples: Sequence[Tensor],
    modality: str,
    out: Path,
    *,
    rate: int,
    separate: bool = False,
    captions: Sequence[str] | None = None,
) -> list[Path]:
    """Writes samples as a person looks at them or listens to them.

    Several pictures come on a sheet that enlarges small ones; sets of views on a sheet with a row for each or, by the
    file's ending, turning as a clip; clips side by side in one clip; sounds in a file each.

    Args:
        samples: (C, F, H, W) each.
        out: the file; where there are several, its name gets the number of each.
        rate: samples per second of sound.
        separate: a file for each sample, which is not enlarged: the next command may edit it.
        captions: written under each picture or set of views, on a sheet.

    Returns:
        The files.

    Raises:
        RecipeError: a file that cannot be written.
    """
    separate = separate or (modality == "audio" and len(samples) > 1)
    groups = [[s] for s in samples] if separate else [list(samples)]
    files = [out.with_name(f"{out.stem}_{i:04d}{out.suffix}") for i in range(len(groups))] if separate else [out]
    for group, file in zip(groups, files, strict=True):
        if modality == "audio":
            _write(file, wav(group[0].reshape(-1).numpy(), rate))
        elif modality == "video" or file.suffix.lower() in CLIPS:
            save_clip(frames_of(group[0]) if separate else _side_by_side(group), file)
        else:
            images = [to_image(s) for s in group]
            if separate or (len(images) == 1 and modality == "image" and not captions):
                save_image(images[0], file)
                continue
            columns = 1 if modality == "multiview" else None
            save_image(grid(images, columns=columns, zoom=zoom_for(images), gap=4, captions=captions), file)
    return files


def frames_of(clip_CFHW: Tensor) -> list[Image.Image]:
    """Every frame of a clip as a picture."""
    return [to_image(frame_CHW[:, None]) for frame_CHW in clip_CFHW.unbind(1)]


def _side_by_side(clips: Sequence[Tensor]) -> list[Image.Image]:
    """The frames of several clips on one sheet each; shorter clips stand still at their end."""
    frames = [frames_of(clip) for clip in clips]
    longest = max(map(len, frames))
    sheets = [[own[min(i, len(own) - 1)] for own in frames] for i in range(longest)]
    return [grid(images, zoom=zoom_for(images), gap=4) for images in sheets]


def save_clip(frames: Sequence[Image.Image], file: Path, fps: int = CLIP_FPS) -> None:
    """Writes frames as H.264 in MP4, or as an animated GIF or WebP.

    Raises:
        RecipeError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() == ".mp4":
            _save_mp4(frames, file, fps)
        else:
            save_animation(frames, file, None, fps)
    except OSError as error:
        raise RecipeError(f"the clip cannot be written: {error.strerror or error}", where=str(file)) from error


def save_animation(
    frames: Sequence[Image.Image], target: Path | BinaryIO, kind: str | None, fps: int = CLIP_FPS
) -> None:
    """Writes an animation that runs around, as GIF or WebP; kind None: as the file's name ends."""
    milliseconds = round(1000 / fps)
    frames[0].save(target, kind, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _save_mp4(frames: Sequence[Image.Image], file: Path, fps: int) -> None:
    import av

    # Players want even sides and four colour samples for each chroma sample.
    width, height = (n + n % 2 for n in frames[0].size)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "14", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in frames:
            padded = Image.new("RGB", (width, height), "white")
            padded.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(padded), format="rgb24")))
        container.mux(stream.encode())


def _write(file: Path, data: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise RecipeError(f"the sound cannot be written: {error.strerror or error}", where=str(file)) from error
