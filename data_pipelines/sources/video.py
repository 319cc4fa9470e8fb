"""The user's own videos: files that PyAV reads, with captions beside them (see `user_files`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.clips import NOT_READ, READ, decode_clips, strip
from flagdit.data_pipelines.pictures import check_size, fit_size, resize_cover
from flagdit.data_pipelines.records import Source
from flagdit.data_pipelines.user_files import Media, captioned_files
from flagdit.errors import RecipeError


def source(
    *,
    src: str | Path,
    size: int = 256,
    multiple: int = 0,
    frames: int = 16,
    fps: float = 8.0,
    clips: int = 1,
    holdout: float = 0.0,
    seed: int = 0,
    limits: LimitsConfig = LimitsConfig(),
) -> Source:
    """Clips of the videos of a folder and its sub-folders, with captions beside them, resized.

    Args:
        src: the folder.
        size: side in pixels of the square whose area no frame exceeds; aspect ratios are kept, none is enlarged.
        multiple: rows and columns are multiples of this many pixels; 0: by the size.
        frames: of a clip.
        fps: frames of a clip per second, taken by the times that the file gives.
        clips: most clips of one file, one after another from its beginning; 0: all.
        holdout: share of files in the split "heldout".
        seed: draws the held-out files.
        limits: what a video may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: no such folder, or no videos in it.
    """
    step = check_size(size, multiple)
    if frames < 1 or not fps > 0 or clips < 0:
        raise RecipeError(f"--frames {frames} and --fps {fps:g} must be positive, --clips {clips} at least 0")

    def load(path: Path) -> Iterator[Media]:
        for number, clip in enumerate(decode_clips(path, fps, frames, clips, limits)):
            before = clip[0].size
            width, height = fit_size(*before, size, step)
            data = strip([resize_cover(frame, width, height) for frame in clip])
            meta = {"fps": fps, "pixels": list(before), "clip": number}
            yield Media({"png": data}, (3, frames, height, width), meta, f"-{number:03d}" if clips != 1 else "")

    settings = {"kind": "video", "size": size, "multiple": step, "frames": frames, "fps": fps, "clips": clips}
    return captioned_files(
        src, load, modality="video", settings=settings, read=READ, not_read=NOT_READ, what="videos",
        holdout=holdout, seed=seed, limits=limits,
    )  # fmt: skip
