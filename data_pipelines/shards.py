"""Webdataset shards: written whole or not at all, with the same bytes every time; read one sample at a time.

A shard is a plain tar: KEY.txt, KEY.json, KEY.png, … one after the other, so any webdataset tool reads it. Nothing in
here unpickles, runs a command, or makes a file from a name that stands in an archive.
"""

from __future__ import annotations

import ast
import errno
import io
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from flagdit.errors import DataError

BLOCK = 512
OPEN_FILES = 64
BF16 = np.dtype("V2")  # how bfloat16 stands in .npy files, here as in other projects


@dataclass(frozen=True)
class Sample:
    """One sample on its way into a shard: its files by ending, and the columns of its index row."""

    key: str
    members: dict[str, bytes]
    shape: tuple[int, int, int, int]
    text_tokens: int = 0
    label: int = -1


@dataclass(frozen=True)
class Row:
    """Where a sample stands in its shard, and what is in it."""

    key: str
    offset: int
    nbytes: int
    xxh3: int
    shape: tuple[int, int, int, int]
    text_tokens: int
    label: int


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` complete and on disk, or not at all.

    Raises:
        DataError: the disk is full or refuses; whatever stood under `path` is untouched.
    """
    staged = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with staged.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            fix=f"{'Free some space' if full else 'Make the folder writable'} and run the same command again.",
        ) from error
    finally:
        staged.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[Sample]) -> list[Row]:
    """Writes one shard. Equal samples give equal bytes: no time, user or machine enters.

    Raises:
        DataError: it cannot be written.
    """
    from webdataset.writer import TarWriter

    places: list[tuple[Sample, int, int]] = []
    with atomic(path) as file:
        writer = TarWriter(file, user="", group="", mtime=0, encoder=False)
        for sample in samples:
            start = writer.tarstream.offset
            writer.write({"__key__": sample.key, **sample.members})
            places.append((sample, start, writer.tarstream.offset - start))
        writer.close()
        # The checksums are of what the file holds, not of what was meant to go there.
        file.flush()
        rows = []
        for sample, offset, nbytes in places:
            file.seek(offset)
            xxh3 = xxhash.xxh3_64_intdigest(file.read(nbytes))
            rows.append(Row(sample.key, offset, nbytes, xxh3, sample.shape, sample.text_tokens, sample.label))
    return rows


class ShardReader:
    """Reads spans of the shards in a folder; keeps the last few files open. Safe after a fork: it never seeks."""

    def __init__(self, folder: Path, local: Callable[[str], Path] | None = None):
        """
        Args:
            folder: of the shards.
            local: name of a shard → its file; None: NAME.tar in the folder.
        """
        self.folder = folder
        self._local = local or (lambda name: folder / f"{name}.tar")
        self._open: OrderedDict[str, int] = OrderedDict()

    def span(self, name: str, offset: int, nbytes: int, xxh3: int) -> memoryview:
        """The bytes of one sample, in memory of its own.

        Raises:
            DataError: the shard is missing, too short, or its bytes have changed since it was written.
        """
        at = 0
        try:
            file = self._file(name)
            there = max(os.fstat(file).st_size - offset, 0)
            data = np.empty(min(nbytes, there), np.uint8).data  # never what a wrong index promises
            while at < len(data):  # one call returns 2 GiB at most
                count = os.preadv(file, [data[at:]], offset + at)
                if not count:  # cut off this very moment
                    there = at
                    break
                at += count
        except OSError as error:
            raise self._fault(name, f"cannot be read: {error.strerror or error}") from error
        if there < nbytes:
            raise self._fault(name, f"ends at byte {offset + there}; its sample needs {nbytes - there} more")
        if xxhash.xxh3_64_intdigest(data) != xxh3:
            raise self._fault(name, f"checksum of the {nbytes} bytes from {offset} is wrong")
        return data

    def _fault(self, name: str, what: str) -> DataError:
        return DataError(what, where=f"{self.folder.name}/{name}.tar")

    def _file(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            self._open[name] = os.open(self._local(name), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return self._open[name]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def split_members(span: bytes | memoryview) -> dict[str, memoryview]:
    """File ending → content of the files of one sample, without copying.

    Raises:
        DataError: not a run of plain ustar files of one key.
    """
    view, at = memoryview(span), 0
    found: dict[str, memoryview] = {}
    keys = set()
    while at < len(span):
        header = bytes(view[at : at + BLOCK])
        if len(header) < BLOCK or header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
            raise DataError(f"no file begins at byte {at} of the sample")
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
            name = header[:100].rstrip(b"\0").decode()
        except ValueError as error:
            raise DataError(f"the header at byte {at} of the sample is broken") from error
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        keys.add((header[345:500], folder, stem))
        content = view[at + BLOCK : at + BLOCK + size]
        if len(content) != size or ending in found or len(keys) > 1:
            raise DataError(f"file {name!r} is cut off, doubled or of another sample")
        found[ending] = content
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return found


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def read_npy(view: memoryview) -> np.ndarray:
    """A plain numeric .npy file as an array on the same memory; allocates nothing that its header promises.

    Two bytes of no type are bfloat16, which numpy does not know, and come as fp32.

    Raises:
        DataError: not such a file, or its size is not that of its header.
    """
    try:
        magic, version, length = struct.unpack_from("<6sHH", view)
        dtype, shape, fortran = _npy_header(bytes(view[10 : 10 + length]))
        content = view[10 + length :]
        if magic != b"\x93NUMPY" or version != 1 or fortran or (dtype.kind not in "fiu" and dtype != BF16):
            raise DataError("not a plain numeric .npy file")
        count = math.prod(shape)
        if min(shape, default=0) < 0 or count * dtype.itemsize != len(content):
            raise DataError(f"a .npy file of {len(content)} bytes for shape {shape} of {dtype}")
        if dtype == BF16:
            return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return np.frombuffer(content, dtype).reshape(shape)
    except DataError:
        raise
    except (struct.error, ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise DataError(f"not a .npy file: {error}") from error


@lru_cache(maxsize=1024)  # a data set has few shapes, and parsing one costs more than reading the sample
def _npy_header(text: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    header = ast.literal_eval(text.decode("latin-1"))
    return np.dtype(header["descr"]), tuple(int(n) for n in header["shape"]), bool(header["fortran_order"])
