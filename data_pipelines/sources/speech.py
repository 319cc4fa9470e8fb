"""Spoken prompts with transcripts, where the Debian packages asterisk-core-sounds-en and …-g722 are installed.

568 prompts of one speaker at 16 kHz (CC-BY-SA 3.0), such as "That agent is already logged on."
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.records import Raw, Rejected, Source, safe_key
from flagdit.data_pipelines.sound import cut, decode_sound, wav
from flagdit.data_pipelines.sources.sounds import check_sound
from flagdit.data_pipelines.user_files import check_holdout, drawn_split, time_limit
from flagdit.errors import DataError

SOUNDS = Path("/usr/share/asterisk/sounds/en")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
G722_BYTES = 8000  # a second
LICENCE = "Asterisk core sounds, English (Allison Smith; Digium, CC-BY-SA 3.0)."


def source(
    *,
    rate: int = 16000,
    seconds: float = 4.0,
    multiple: int = 1024,
    limit: int = 0,
    holdout: float = 0.0,
    seed: int = 0,
    sounds: str = str(SOUNDS),
    transcripts: str = str(TRANSCRIPTS),
    limits: LimitsConfig = LimitsConfig(),
) -> Source:
    """Spoken prompts and their transcripts.

    Args:
        rate: samples per second.
        seconds: longest prompt that is taken; a longer one would be cut off in the middle of its transcript.
        multiple: lengths are multiples of this many samples: audio.hop times model.patch_size.
        limit: prompts, in the order of their names; 0: all.
        holdout: share of prompts in the split "heldout".
        seed: draws the held-out prompts.
        sounds: folder of the .g722 files.
        transcripts: gzipped text, one "name: transcript" a line.
        limits: what a sound may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: the packages are not installed.
    """
    check_sound(rate, seconds, multiple)
    check_holdout(holdout)
    folder, texts = Path(sounds), Path(transcripts)
    if not folder.is_dir() or not texts.is_file():
        raise DataError(
            f"there are no spoken prompts ({folder if not folder.is_dir() else texts} is missing)",
            fix="On Debian: `apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-g722`.",
        )
    with gzip.open(texts, "rt", encoding="utf-8", errors="strict") as file:
        lines = [line.strip().partition(":") for line in file if ":" in line and not line.startswith(";")]
    spoken = {name.strip(): text.strip() for name, _, text in lines if text.strip()}
    files = [p for p in sorted(folder.rglob("*.g722")) if p.stat().st_size <= seconds * G722_BYTES]
    files = [p for p in files if p.relative_to(folder).with_suffix("").as_posix() in spoken]
    files = files[: limit or None]

    def items() -> Iterator[Raw | Rejected]:
        for path in files:
            name = path.relative_to(folder).with_suffix("").as_posix()
            try:
                with time_limit(limits.sample_seconds):
                    samples = cut(decode_sound(path, rate, limits), rate, seconds + multiple / rate, multiple)
            except DataError as error:
                yield Rejected(name, error.what)
                continue
            yield Raw(
                key=safe_key(name),
                media={"wav": wav(samples, rate)},
                shape=(1, 1, 1, len(samples)),
                caption=f'a woman says "{spoken[name]}"',
                split=drawn_split(seed, name, holdout),
                meta={"transcript": spoken[name], "rate": rate},
            )

    settings = {
        "kind": "speech", "rate": rate, "seconds": seconds, "multiple": multiple, "limit": limit, "holdout": holdout,
        "seed": seed, "files": [[p.name, p.stat().st_size] for p in files], "limits": vars(limits),
    }  # fmt: skip
    return Source("audio", len(files), settings, LICENCE, items())
