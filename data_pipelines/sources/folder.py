"""The user's own pictures: a folder of PNG, JPEG and WebP files with captions beside them (see `user_files`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.pictures import check_size, fitted
from flagdit.data_pipelines.records import Source
from flagdit.data_pipelines.user_files import Media, captioned_files

READ = {".png", ".jpg", ".jpeg", ".webp"}
NOT_READ = {".avif", ".bmp", ".gif", ".heic", ".jp2", ".tif", ".tiff"}


def source(
    *,
    src: str | Path,
    size: int = 256,
    multiple: int = 0,
    keep_jpeg: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
    limits: LimitsConfig = LimitsConfig(),
) -> Source:
    """Pictures of a folder and its sub-folders, with captions beside them, resized.

    Args:
        src: the folder.
        size: side in pixels of the square whose area no picture exceeds; aspect ratios are kept, none is enlarged.
        multiple: rows and columns are multiples of this many pixels; 0: by the size.
        keep_jpeg: JPEG files go into the shards as they are, and are decoded when they are encoded or trained on.
        holdout: share of pictures in the split "heldout".
        seed: draws the held-out pictures.
        limits: what a picture may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: no such folder, or no pictures in it.
    """
    step = check_size(size, multiple)

    def load(path: Path) -> Iterator[Media]:
        media, width, height, before = fitted(path.read_bytes(), size, step, limits.max_pixels, keep_jpeg)
        yield Media(media, (3, 1, height, width), {"pixels": before})

    settings = {"kind": "folder", "size": size, "multiple": step, "keep_jpeg": keep_jpeg}
    return captioned_files(
        src, load, modality="image", settings=settings, read=READ, not_read=NOT_READ, what="pictures",
        holdout=holdout, seed=seed, limits=limits,
    )  # fmt: skip
