"""The user's own pictures: a folder of PNG, JPEG and WebP files with captions beside them.

The caption of DIR/NAME.png is the text of DIR/NAME.txt, else "caption" in DIR/NAME.json, else "caption" in the line of
captions.jsonl, in the folder itself, whose "file" is DIR/NAME.png. NAME.json and captions.jsonl may also hold an
integer "label". Whatever cannot be used is rejected with its reason; nothing is made up or left out in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flagdit.data_pipelines.pictures import MAX_PIXELS, check_size, decode_picture, fit_size, png, resize_cover
from flagdit.data_pipelines.records import Raw, Rejected, Source, safe_key, stable_hash
from flagdit.errors import DataError, RecipeError

READ = {".png", ".jpg", ".jpeg", ".webp"}
NOT_READ = {".avif", ".bmp", ".gif", ".heic", ".jp2", ".tif", ".tiff"}
CAPTIONS = "captions.jsonl"
LONGEST_CAPTION = 10_000


def source(
    *,
    src: str | Path,
    size: int = 256,
    multiple: int = 0,
    holdout: float = 0.0,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Pictures of a folder and its sub-folders, resized.

    Args:
        src: the folder.
        size: side in pixels of the square whose area no picture exceeds; aspect ratios are kept, none is enlarged.
        multiple: rows and columns are multiples of this many pixels; 0: by the size.
        holdout: share of pictures in the split "heldout".
        seed: draws the held-out pictures.
        max_pixels: a picture with more is rejected without being decoded.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: no such folder, or no pictures in it.
    """
    folder = Path(src).expanduser()
    multiple = check_size(size, multiple)
    if not 0 <= holdout < 1:
        raise RecipeError(f"--holdout {holdout} is not a share from 0 to below 1")
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(src), fix="Give the folder of your pictures (--from).")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if p.suffix.lower() in READ | NOT_READ]
    if not any(p.suffix.lower() in READ for p in pictures):
        raise DataError(
            "holds no pictures", where=str(src), fix="PNG, JPEG and WebP files are read, in sub-folders too."
        )
    listed, broken = _captions(folder)
    strangers = set(listed) - {p.relative_to(folder).as_posix() for p in pictures}
    broken += [Rejected(name, f"{CAPTIONS} names it, but it is not there") for name in sorted(strangers)]

    def items() -> Iterator[Raw | Rejected]:
        yield from broken
        seen = ("", "")
        for path in sorted(pictures, key=lambda p: (p.parent, p.stem, p.suffix)):
            name = path.relative_to(folder).as_posix()
            stem = name[: -len(path.suffix)]
            if stem == seen[0]:
                yield Rejected(name, f"has the same name as {seen[1]}")
                continue
            seen = (stem, name)
            try:
                yield _read(path, name, stem, listed.get(name), size, multiple, max_pixels, holdout, seed)
            except DataError as error:
                yield Rejected(name, error.what)

    relevant = [p for p in files if p in set(pictures) or p.suffix in (".txt", ".json", ".jsonl")]
    stats = [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in relevant]
    settings = {
        "kind": "folder",
        "files": f"{stable_hash(*stats):016x}",
        "size": size,
        "multiple": multiple,
        "holdout": holdout,
        "seed": seed,
        "max_pixels": max_pixels,
    }
    return Source("image", len(pictures) + len(broken), settings, "the user's own pictures", items())


def _read(
    path: Path,
    name: str,
    stem: str,
    listed: dict[str, Any] | None,
    size: int,
    multiple: int,
    max_pixels: int,
    holdout: float,
    seed: int,
) -> Raw:
    if path.suffix.lower() in NOT_READ:
        raise DataError(f"{path.suffix} files are not read; convert it to PNG, JPEG or WebP")
    caption, label = _caption(path, listed)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    picture = decode_picture(data, max_pixels)
    width, height = fit_size(picture.width, picture.height, size, multiple)
    drawn = stable_hash(seed, "holdout", stem) / 2**64
    return Raw(
        key=safe_key(stem),
        media={"png": png(resize_cover(picture, width, height))},
        shape=(3, 1, height, width),
        caption=caption,
        split="heldout" if drawn < holdout else "train",
        label=label,
        meta={"file": name, "pixels": [picture.width, picture.height]},
    )


def _caption(path: Path, listed: dict[str, Any] | None) -> tuple[str, int]:
    """Caption and label of one picture.

    Raises:
        DataError: no caption, an empty one, or one that is not text.
    """
    text, entry = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        found = _object(entry.read_bytes()) if entry.is_file() else listed or {}
        caption = text.read_bytes().decode() if text.is_file() else found.get("caption")
    except UnicodeDecodeError as error:
        raise DataError("its caption is not UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"its caption cannot be read ({error})") from error
    if caption is None:
        raise DataError("has no caption: no NAME.txt, no NAME.json, no line in captions.jsonl")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError("its caption is empty" if isinstance(caption, str) else "its caption is not a text")
    if len(caption) > LONGEST_CAPTION:
        raise DataError(f"its caption has {len(caption)} letters; {LONGEST_CAPTION} at most")
    label = found.get("label", -1)
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < 2**31:
        raise DataError(f"its label {label!r} is not a class number")
    return " ".join(caption.split()), label


def _captions(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Rejected]]:
    """File → entry of captions.jsonl, and the lines that are not usable."""
    path = folder / CAPTIONS
    if not path.is_file():
        return {}, []
    listed: dict[str, dict[str, Any]] = {}
    broken = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _object(line)
            name = entry["file"]
            if not isinstance(name, str) or name in listed:
                raise ValueError("its file is given twice or is not a text")
            listed[name] = entry
        except (ValueError, KeyError) as error:
            broken.append(Rejected(f"{CAPTIONS}:{number}", f"not a line with file and caption ({error!r})"))
    return listed, broken


def _object(data: bytes) -> dict[str, Any]:
    found = json.loads(data.decode())
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found
