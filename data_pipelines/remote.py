"""Data sets on object stores: the index is copied once, shards are copied when they are needed, within bounds.

Addresses are fsspec's (s3://bucket/folder, gs://…, https://…), as far as the library for the store is installed. Whole
shards are fetched, since the order of a run stays within a group of shards for a while, and the least recently used
ones make room.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagdit.data_pipelines.shards import atomic
from flagdit.errors import DataError

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "hdfs", "file", "memory")
"""What is read. Never a shell, another machine's login, or an archive inside an archive."""

ATTEMPTS, WAIT = 4, 0.5  # seconds before the second attempt, doubled each time
GIB = 1 << 30


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address."""
    return "://" in str(path) or "::" in str(path)


@dataclass(frozen=True)
class Cache:
    """Where copies lie, and how much room they may take.

    Attributes:
        folder: of this machine; ranks and runs may share it.
        gib: of shards together, in 2³⁰ bytes; at least the one in use is kept.
    """

    folder: str
    gib: float


@dataclass(frozen=True)
class RemoteShards:
    """The shards of one remote data set."""

    url: str
    mirror: Path
    cache: Cache

    def local(self, name: str) -> Path:
        """A local copy of shards/NAME.tar, fetched if there is none.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.mirror / "shards" / f"{name}.tar"
        try:
            os.utime(path)
            return path
        except FileNotFoundError:
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(f"{self.url}/shards/{name}.tar", path)
        self._make_room(keep=path)
        return path

    def _make_room(self, keep: Path) -> None:
        """Deletes the copies of any data set that were used least recently. Files in use live on until closed."""
        shards = []
        for file in Path(self.cache.folder).glob("*/shards/*.tar"):
            try:
                stat = file.stat()
            except FileNotFoundError:  # another process made room, too
                continue
            shards.append((stat.st_mtime_ns, stat.st_size, file))
        over = sum(size for _, size, _ in shards) - self.cache.gib * GIB
        for _, size, file in sorted(shards):
            if over <= 0:
                return
            if file != keep:
                file.unlink(missing_ok=True)
                over -= size


def mirror(url: str, cache: Cache | None, columns: tuple[str, ...]) -> RemoteShards:
    """Copies what is needed to open a remote data set: everything but its shards.

    Args:
        url: its folder.
        cache: None: no cache was given, and remote data cannot be used.
        columns: of the index.

    Raises:
        DataError: an address that is not read, or files that cannot be fetched.
    """
    protocol = url.partition("://")[0]
    if "::" in url or protocol not in PROTOCOLS:
        raise DataError(f"{protocol}:// is not read", where=url, fix=f"Use one of {', '.join(PROTOCOLS)}.")
    if cache is None:
        raise DataError("an address can be trained on, but not used here", where=url, fix="Copy the data set first.")
    url = url.rstrip("/")
    folder = Path(cache.folder).expanduser() / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        (folder / "index").mkdir(parents=True, exist_ok=True)
        # The description comes each time: a data set that was made anew is told by it.
        fresh = folder / "dataset.json.new"
        _fetch(f"{url}/dataset.json", fresh)
        known = folder / "dataset.json"
        if not known.is_file() or known.read_bytes() != fresh.read_bytes():
            for stale in [*folder.glob("index/*"), *folder.glob("shards/*"), *folder.glob("null_text.npy")]:
                stale.unlink(missing_ok=True)
            info: dict[str, Any] = json.loads(fresh.read_bytes())
            for name in columns:
                _fetch(f"{url}/index/{name}.npy", folder / "index" / f"{name}.npy")
            if info.get("text") is not None:
                _fetch(f"{url}/null_text.npy", folder / "null_text.npy")
        fresh.replace(known)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"cannot be fetched ({type(error).__name__}: {error})",
            where=url,
            fix="Check the address and your access to it; stores need a library (s3fs, gcsfs, aiohttp, …).",
        ) from error
    return RemoteShards(url, folder, Cache(str(folder.parent), cache.gib))


def _fetch(url: str, path: Path) -> None:
    """Copies one file, whole or not at all; tries again after passing faults.

    Raises:
        OSError: it cannot be had.
    """
    import fsspec

    for attempt in range(ATTEMPTS):
        try:
            with fsspec.open(url, "rb") as source, atomic(path) as file:
                while block := source.read(1 << 22):
                    file.write(block)
            return
        except FileNotFoundError:
            raise
        except (OSError, DataError) as error:
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{url}: {error}") from error
            time.sleep(WAIT * 2**attempt)
