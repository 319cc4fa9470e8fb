"""Clips for sources: video files to evenly timed frames within limits; frames to one picture and back.

A raw clip, or a set of views, is kept as one PNG with its frames below one another: lossless, and any viewer shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.pictures import png
from flagdit.errors import DataError

READ = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"}
NOT_READ = {".wmv", ".flv", ".mpg", ".mpeg", ".ts"}


def strip(frames: Sequence[Image.Image]) -> bytes:
    """Frames of one size as a PNG, one below the other."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (0, i * height))
    return png(sheet)


def decode_clips(path: Path, fps: float, frames: int, most: int, limits: LimitsConfig) -> Iterator[list[Image.Image]]:
    """Clips of a file, one after another: each of `frames` RGB pictures, 1/fps seconds apart.

    Args:
        most: clips; 0: all that are whole.

    Raises:
        DataError: see `decode_frames`; and a video that is shorter than one clip.
    """
    waiting: list[Image.Image] = []
    count = 0
    for picture in decode_frames(path, fps, limits):
        waiting.append(picture)
        if len(waiting) == frames:
            yield waiting
            waiting, count = [], count + 1
            if count == most:
                return
    if not count:
        raise DataError(f"has {len(waiting)} frames at {fps:g} a second; a clip needs {frames}")


def decode_frames(path: Path, fps: float, limits: LimitsConfig) -> Iterator[Image.Image]:
    """The RGB picture shown at each multiple of 1/fps seconds of a file.

    Raises:
        DataError: not a video, a broken one, or more pixels or frames than allowed.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError("has no pictures")
            yield from _timed(container, fps, limits)
    except DataError:
        raise
    except (av.FFmpegError, ValueError, OSError, MemoryError) as error:
        raise DataError(f"cannot be decoded as video ({type(error).__name__}: {error})") from error


def _timed(container: Any, fps: float, limits: LimitsConfig) -> Iterator[Image.Image]:
    """The frame shown at each multiple of 1/fps seconds."""
    stream = container.streams.video[0]
    if stream.width * stream.height > limits.max_pixels:
        raise DataError(f"{stream.width}×{stream.height} px is more than limits.max_pixels={limits.max_pixels}")
    begin: float | None = None
    due, shown, at = 0, None, 0.0
    for number, frame in enumerate(container.decode(stream)):
        if number >= limits.max_frames:
            raise DataError(f"has more than limits.max_frames={limits.max_frames} frames")
        if frame.width * frame.height > limits.max_pixels:
            raise DataError(f"a frame of {frame.width}×{frame.height} px is more than limits.max_pixels")
        time = frame.time if frame.time is not None else number / float(stream.average_rate or fps)
        begin = time if begin is None else begin
        at = time - begin
        while shown is not None and due / fps < at - 1e-6:
            yield shown.copy()
            due += 1
            if due > limits.max_frames:
                raise DataError(f"lasts longer than limits.max_frames={limits.max_frames} at {fps:g} a second")
        shown = frame.to_image().convert("RGB")
    if shown is not None:
        yield shown
