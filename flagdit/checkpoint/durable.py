"""Files and folders that survive a crash, with a hash of every file.

Each step that reaches the disk is one call of `os` (open, write, fsync, rename, mkdir): the tests cut a save at every
one of them. The hash is XXH3 with 128 bits: it finds every accident and costs a few hundredths of the writing; it is no
protection against forgery.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

CHUNK = 1 << 22
"""Bytes that one call reads or writes."""
AHEAD = 1 << 25
"""Bytes after which the disk is sent to work, while the next are on their way."""


@dataclass(frozen=True)
class FileRecord:
    """A file's line of the manifest.

    Attributes:
        bytes: its size.
        xxh3: hash of its content, hexadecimal.
    """

    bytes: int
    xxh3: str


class DurableFile:
    """A new file that is hashed while it is written; a context manager.

    Leaving the context does not wait for the disk: `sync` does, so that several files can be on their way together.

    Raises:
        OSError: also where the file exists.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = self._sent = 0
        self._hash = xxhash.xxh3_128()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        while left:
            piece = left[:CHUNK]
            count = os.write(self._descriptor, piece)
            self._hash.update(piece[:count])
            self.size += count
            left = left[count:]
            if self.size - self._sent >= AHEAD:
                # Linux starts to write what it is advised to forget; nor does a checkpoint push out what is read again.
                os.posix_fadvise(self._descriptor, self._sent, self.size - self._sent, os.POSIX_FADV_DONTNEED)
                self._sent = self.size

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.size, self._hash.hexdigest())

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Writes a small file, without waiting for the disk."""
    with DurableFile(path) as file:
        file.write(data)
    return file.record


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_bytes(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Size and hash of what is on the disk.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(CHUNK, os.fstat(file.fileno()).st_size) or 1))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())
