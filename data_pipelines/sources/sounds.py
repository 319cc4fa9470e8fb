"""The user's own sounds: files that PyAV reads, with captions or transcripts beside them (see `user_files`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.records import Source
from flagdit.data_pipelines.sound import NOT_READ, READ, cut, decode_sound, wav
from flagdit.data_pipelines.user_files import Media, captioned_files
from flagdit.errors import RecipeError


def check_sound(rate: int, seconds: float, multiple: int) -> None:
    """
    Raises:
        RecipeError: options of a sound source that make no sense.
    """
    if rate < 1000 or not seconds > 0 or multiple < 1:
        raise RecipeError(
            f"--rate {rate} must be 1000 or more, --seconds {seconds:g} and --multiple {multiple} positive"
        )


def source(
    *,
    src: str | Path,
    rate: int = 16000,
    seconds: float = 10.0,
    multiple: int = 1024,
    holdout: float = 0.0,
    seed: int = 0,
    limits: LimitsConfig = LimitsConfig(),
) -> Source:
    """Sounds of a folder and its sub-folders, with captions beside them, as mono waveforms.

    Args:
        src: the folder.
        rate: samples per second; files of other rates are resampled.
        seconds: longest sound; longer ones are cut.
        multiple: lengths are multiples of this many samples: audio.hop times model.patch_size.
        holdout: share of files in the split "heldout".
        seed: draws the held-out files.
        limits: what a sound may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: no such folder, or no sounds in it.
    """
    check_sound(rate, seconds, multiple)

    def load(path: Path) -> Iterator[Media]:
        samples = cut(decode_sound(path, rate, limits), rate, seconds, multiple)
        yield Media({"wav": wav(samples, rate)}, (1, 1, 1, len(samples)), {"rate": rate})

    settings = {"kind": "sounds", "rate": rate, "seconds": seconds, "multiple": multiple}
    return captioned_files(
        src, load, modality="audio", settings=settings, read=READ, not_read=NOT_READ, what="sounds",
        holdout=holdout, seed=seed, limits=limits,
    )  # fmt: skip
