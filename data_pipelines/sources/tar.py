"""Webdataset tars of others: pictures with .txt or .json captions, read as plain archives.

Members are never unpacked to disk, unpickled or run, and their names only ever become keys.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.pictures import check_size, fitted
from flagdit.data_pipelines.records import Raw, Rejected, Source, safe_key
from flagdit.data_pipelines.user_files import captions_of, check_bytes, check_holdout, drawn_split, time_limit
from flagdit.errors import DataError

PICTURES = ("png", "jpg", "jpeg", "webp")


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
    """Pictures and captions of webdataset tars, resized.

    Args:
        src: a .tar file, or a folder of them.
        size: side in pixels of the square whose area no picture exceeds; aspect ratios are kept, none is enlarged.
        multiple: rows and columns are multiples of this many pixels; 0: by the size.
        keep_jpeg: JPEG files go into the shards as they are, and are decoded when they are encoded or trained on.
        holdout: share of pictures in the split "heldout".
        seed: draws the held-out pictures.
        limits: what a picture may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: no such tars.
    """
    step = check_size(size, multiple)
    check_holdout(holdout)
    place = Path(src).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*.tar"))
    if not files:
        raise DataError("holds no .tar files", where=str(src), fix="Give a tar, or a folder of them (--from).")

    def items() -> Iterator[Raw | Rejected]:
        seen: set[str] = set()
        for file in files:
            for key, members in _groups(file, limits):
                name = f"{file.stem}/{key}"
                if key and name in seen:
                    yield Rejected(name, "comes twice: the tar holds this key in two places")
                    continue
                seen.add(name)
                if isinstance(members, DataError):
                    yield Rejected(name, members.what)
                    continue
                try:
                    with time_limit(limits.sample_seconds):
                        yield _read(name, members, step)
                except DataError as error:
                    yield Rejected(name, error.what)

    def _read(name: str, members: dict[str, bytes], step: int) -> Raw:
        pictures = [members[e] for e in PICTURES if e in members]
        if len(pictures) != 1:
            raise DataError(f"has {len(pictures)} pictures ({', '.join(sorted(members)) or 'no files'})")
        captions, label = captions_of(_entry(members), limits)
        media, width, height, before = fitted(pictures[0], size, step, limits.max_pixels, keep_jpeg)
        shape = (3, 1, height, width)
        meta = {"file": name, "pixels": before}
        return Raw(safe_key(name), media, shape, captions[0], drawn_split(seed, name, holdout), label, meta,
                   captions[1:])  # fmt: skip

    stats = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    settings = {
        "kind": "tar", "files": stats, "size": size, "multiple": step, "keep_jpeg": keep_jpeg,
        "holdout": holdout, "seed": seed, "limits": vars(limits),
    }  # fmt: skip
    return Source("image", _count(files), settings, "the user's own tars", items())


def _groups(file: Path, limits: LimitsConfig) -> Iterator[tuple[str, dict[str, bytes] | DataError]]:
    """Key → files by ending of every run of members with one key; in a broken place, the reason."""
    key, members, fault = "", {}, None  # type: str, dict[str, bytes], DataError | None
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if not member.isfile() and not member.isdir():
                    yield member.name, DataError("is a link or a device, not a file")
                    continue
                if member.isdir() or Path(member.name).name.startswith("."):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                new = f"{folder}/{stem}".lstrip("./")
                if new != key and key:
                    yield key, fault or members
                    members, fault = {}, None
                key = new
                try:
                    if ending.lower() in members:
                        raise DataError(f"has two files .{ending}")
                    check_bytes(member.size + sum(map(len, members.values())), limits)
                    content = archive.extractfile(member)
                    members[ending.lower()] = content.read() if content else b""
                except DataError as error:
                    fault = error
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield key, DataError(f"the tar ends here: it is cut off or broken ({error})")
        return
    if key:
        yield key, fault or members


def _entry(members: dict[str, bytes]) -> dict[str, Any]:
    try:
        found = json.loads(members["json"].decode()) if "json" in members else {}
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        if "txt" in members:
            found["caption"] = members["txt"].decode()
    except UnicodeDecodeError as error:
        raise DataError("its caption is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"its caption cannot be read ({error})") from error
    return found


def _count(files: list[Path]) -> int:
    """About how many samples there are: keys of the members, as far as the tars can be read."""
    keys = set()
    for file in files:
        try:
            with tarfile.open(file, "r:") as archive:
                keys |= {(file.name, m.name.partition(".")[0]) for m in archive if m.isfile()}
        except (tarfile.TarError, OSError, EOFError):
            keys.add((file.name, ""))
    return len(keys)
