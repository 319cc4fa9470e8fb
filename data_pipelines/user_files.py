"""The user's own files with captions beside them: the part that pictures, clips, sounds and meshes have in common.

The caption of DIR/NAME.EXT is the text of DIR/NAME.txt, else "caption" in DIR/NAME.json, else "caption" in the line of
captions.jsonl, in the folder itself, whose "file" is DIR/NAME.EXT. The two JSON forms may also hold "captions", a list
of further ones, and an integer "label". What cannot be used is rejected with its reason; nothing is made up or left
out in silence.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.records import Raw, Rejected, Source, safe_key, stable_hash
from flagdit.errors import DataError, RecipeError

CAPTIONS = "captions.jsonl"
BESIDE = (".txt", ".json", ".jsonl", ".mtl", ".png", ".jpg")  # captions, and what meshes refer to


@dataclass(frozen=True)
class Media:
    """What one file gives: see `Raw`; a file that gives several samples names each by a suffix of its key."""

    media: dict[str, bytes]
    shape: tuple[int, int, int, int]
    meta: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""


def captioned_files(
    src: str | Path,
    load: Callable[[Path], Iterable[Media]],
    *,
    modality: str,
    settings: dict[str, Any],
    read: Iterable[str],
    not_read: Iterable[str],
    what: str,
    holdout: float,
    seed: int,
    limits: LimitsConfig,
) -> Source:
    """Every file of a folder and its sub-folders, with its caption.

    Args:
        src: the folder.
        load: decodes one file; raises DataError with the reason where it cannot.
        settings: the source's own, its "kind" among them.
        read, not_read: endings of files that are loaded, and of those that should be but cannot.
        what: for messages, e.g. "pictures (PNG, JPEG, WebP)".
        holdout: share of files in the split "heldout", drawn by `seed`.

    Raises:
        RecipeError: `holdout` is not a share.
        DataError: no such folder, or no such files in it.
    """
    check_holdout(holdout)
    found = _look_through(Path(src).expanduser(), frozenset(read), frozenset(not_read), what)

    def items() -> Iterator[Raw | Rejected]:
        yield from found.broken
        seen = ("", "")
        for path in found.media:
            name = found.name(path)
            stem = name[: -len(path.suffix)]
            if stem == seen[0]:
                yield Rejected(name, f"has the same name as {seen[1]}")
                continue
            seen = (stem, name)
            try:
                loaded, captions, label = _load(found, path, load, limits)
            except DataError as error:
                yield Rejected(name, error.what)
                continue
            split = drawn_split(seed, stem, holdout)
            for m in loaded:
                key, meta = safe_key(stem + m.suffix), {"file": name, **m.meta}
                yield Raw(key, m.media, m.shape, captions[0], split, label, meta, captions[1:])

    own = {"files": found.fingerprint(), "holdout": holdout, "seed": seed, "limits": vars(limits)}
    total = len(found.media) + len(found.broken)
    return Source(modality, total, {**settings, **own}, "the user's own files", items())


@dataclass(frozen=True)
class _Files:
    """What a folder of the user's holds.

    Attributes:
        files: all of them, hidden ones excepted.
        media: those of the kind that is wanted, sorted so that files of one name stand together.
        read: endings that can be loaded; media may have others.
        listed: file → entry of captions.jsonl.
        broken: lines of captions.jsonl that say nothing about a file here.
    """

    folder: Path
    files: list[Path]
    media: list[Path]
    read: frozenset[str]
    listed: dict[str, dict[str, Any]]
    broken: list[Rejected]

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def fingerprint(self) -> str:
        """Changes when a file that may matter does."""
        media = set(self.media)
        relevant = [p for p in self.files if p in media or p.suffix in BESIDE]
        stats = [(p, p.stat()) for p in relevant]
        return f"{stable_hash(*((self.name(p), s.st_size, s.st_mtime_ns) for p, s in stats)):016x}"


def _look_through(folder: Path, read: frozenset[str], not_read: frozenset[str], what: str) -> _Files:
    """
    Raises:
        DataError: no such folder, or nothing in it that can be read.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder), fix=f"Give the folder of your {what} (--from).")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    media = [p for p in files if p.suffix.lower() in read | not_read]
    if not any(p.suffix.lower() in read for p in media):
        endings = ", ".join(sorted(read))
        raise DataError(
            f"holds no {what}", where=str(folder), fix=f"Files ending in {endings} are read, in sub-folders too."
        )
    listed, broken = _listed_captions(folder)
    strangers = set(listed) - {p.relative_to(folder).as_posix() for p in media}
    broken += [Rejected(name, f"{CAPTIONS} names it, but it is not there") for name in sorted(strangers)]
    return _Files(folder, files, sorted(media, key=lambda p: (p.parent, p.stem, p.suffix)), read, listed, broken)


def _load(
    found: _Files, path: Path, load: Callable[[Path], Iterable[Media]], limits: LimitsConfig
) -> tuple[list[Media], tuple[str, ...], int]:
    """One file's samples, captions and label.

    Raises:
        DataError: the reason why it cannot be used.
    """
    try:
        if path.suffix.lower() not in found.read:
            raise DataError(f"{path.suffix} files are not read; convert it to one of {', '.join(sorted(found.read))}")
        if found.folder.resolve() not in path.resolve().parents:
            raise DataError("is a link that leads out of the folder")
        check_bytes(path.stat().st_size, limits)
        captions, label = captions_of(caption_entry(path, found.listed.get(found.name(path))), limits)
        with time_limit(limits.sample_seconds):
            return list(load(path)), captions, label
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from error


def check_holdout(holdout: float) -> None:
    """
    Raises:
        RecipeError: not a share from 0 to below 1.
    """
    if not 0 <= holdout < 1:
        raise RecipeError(f"--holdout {holdout} is not a share from 0 to below 1")


def drawn_split(seed: int, name: str, holdout: float) -> str:
    """The split of a sample of that name."""
    return "heldout" if stable_hash(seed, "holdout", name) / 2**64 < holdout else "train"


def check_bytes(size: int, limits: LimitsConfig) -> None:
    """
    Raises:
        DataError: more bytes than a sample may have, or none.
    """
    if not size:
        raise DataError("is an empty file")
    if size > limits.max_sample_bytes:
        raise DataError(f"has {size} bytes; limits.max_sample_bytes={limits.max_sample_bytes}")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what takes too long, such as a source that stalls or a file made to be decoded for ever.

    Works in the main thread of a process; elsewhere there is no limit.

    Raises:
        DataError: the body took longer.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise DataError(f"takes longer than limits.sample_seconds={seconds:g}")

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again, since an exception in a destructor is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def caption_entry(path: Path, listed: dict[str, Any] | None) -> dict[str, Any]:
    """What is known about one file: "caption", "captions", "label".

    Raises:
        DataError: files that cannot be read, or nothing.
    """
    text, entry = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        found = _object(entry.read_bytes()) if entry.is_file() else dict(listed or {})
        if text.is_file():
            found["caption"] = text.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError("its caption is not UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"its caption cannot be read ({error})") from error
    if found.get("caption") is None and not found.get("captions"):
        raise DataError("has no caption: no NAME.txt, no NAME.json, no line in captions.jsonl")
    return found


def captions_of(entry: dict[str, Any], limits: LimitsConfig) -> tuple[tuple[str, ...], int]:
    """Captions, at least one, and label of an entry.

    Raises:
        DataError: a caption that is empty, too long or no text, or a label that is no class number.
    """
    first, more = entry.get("caption"), entry.get("captions", [])
    if not isinstance(more, list):
        raise DataError("its captions are not a list")
    captions = [*([] if first is None else [first]), *more]
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise DataError("its caption is empty" if isinstance(caption, str) else "its caption is not a text")
        if len(caption) > limits.max_caption:
            raise DataError(f"its caption has {len(caption)} letters; limits.max_caption={limits.max_caption}")
        if any(ord(c) in range(0xD800, 0xE000) or c == "\0" for c in caption):
            raise DataError("its caption holds letters that are not text")
    if not captions:
        raise DataError("has no caption")
    label = entry.get("label", -1)
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < 2**31:
        raise DataError(f"its label {label!r} is not a class number")
    return tuple(dict.fromkeys(" ".join(c.split()) for c in captions)), label


def _listed_captions(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Rejected]]:
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
        except (ValueError, KeyError, RecursionError) as error:
            broken.append(Rejected(f"{CAPTIONS}:{number}", f"not a line with file and caption ({error!r})"))
    return listed, broken


def _object(data: bytes) -> dict[str, Any]:
    found = json.loads(data.decode())
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found
