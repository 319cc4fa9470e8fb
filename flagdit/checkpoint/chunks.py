"""Where the pieces of a checkpoint's tensors lie in its files, and reading any rectangle of a tensor from them.

A group of tensors is a folder: safetensors files that the ranks wrote, each with rectangles of tensors, and
`index.json`, which says where every rectangle is. The headers of the files tell the same, in the form that
`torch.distributed.checkpoint`'s own reader of safetensors understands; the index saves opening thousands of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flagdit.checkpoint.safetensors_files import NAMES, TORCH, bytes_of
from flagdit.checkpoint.tensors import Entry, TensorSource
from flagdit.errors import CheckpointError
from flagdit.parallel.shards import Box

INDEX = "index.json"
SLAB = 1 << 26
"""Bytes that are in memory at once while a piece of a tensor is written or read."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor in a file.

    Attributes:
        box: which part of the tensor.
        file: name inside the group's folder.
        start: first byte in the file.
    """

    box: Box
    file: str
    start: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: shape and dtype, and the rectangles that make it up."""

    entry: Entry
    chunks: tuple[Chunk, ...]


Index = dict[str, Stored]


def index_bytes(index: Mapping[str, Stored]) -> bytes:
    """An index as JSON; files by number, so that thousands of ranks stay small."""
    files = sorted({chunk.file for stored in index.values() for chunk in stored.chunks})
    number = {file: i for i, file in enumerate(files)}
    tensors = {
        name: {
            "dtype": NAMES[stored.entry.dtype],
            "shape": stored.entry.shape,
            "chunks": [[number[c.file], c.start, c.box.offsets, c.box.sizes] for c in stored.chunks],
        }
        for name, stored in index.items()
    }
    return (json.dumps({"files": files, "tensors": tensors}, separators=(",", ":")) + "\n").encode()


def read_index(folder: Path) -> Index:
    """The index of a group.

    Raises:
        CheckpointError: it is missing or not as `index_bytes` writes it.
    """
    try:
        content = json.loads((folder / INDEX).read_bytes())
        files = content["files"]
        return {
            name: Stored(
                Entry(tuple(spec["shape"]), TORCH[spec["dtype"]]),
                tuple(Chunk(Box(tuple(at), tuple(sizes)), files[i], start) for i, start, at, sizes in spec["chunks"]),
            )
            for name, spec in content["tensors"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"the index cannot be read: {error}", where=str(folder / INDEX)) from error


class StoredTensors(TensorSource):
    """The tensors of one group of a checkpoint."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._index = read_index(folder)
        self.entries = {name: stored.entry for name, stored in self._index.items()}

    def read(self, name: str) -> Tensor:
        stored = self._index[name]
        tensor = torch.empty(stored.entry.shape, dtype=stored.entry.dtype)
        for chunk in stored.chunks:
            with opened(self._folder / chunk.file) as file:
                read_box(file, chunk, stored.entry.dtype, chunk.box, chunk.box.of(tensor))
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file's descriptor, for reading.

    Raises:
        CheckpointError: it cannot be opened or read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", where=str(path)) from error


def read_box(file: int, chunk: Chunk, dtype: torch.dtype, box: Box, into: Tensor) -> None:
    """Reads a rectangle that lies inside a chunk, with at most SLAB bytes in memory beside the target.

    Args:
        file: descriptor of the chunk's file.
        dtype: of the tensor.
        box: which part of the tensor to read.
        into: memory of the box's sizes, on any device and in any layout.
    """
    if not box.numel:
        return
    sizes = chunk.box.sizes
    inside = box.moved([-at for at in chunk.box.offsets])
    if not sizes:
        _read_rows(file, chunk.start, into.view(1), dtype, (1,), Box((0,), (1,)))
    else:
        _read_rows(file, chunk.start, into, dtype, sizes, inside)


def _read_rows(file: int, start: int, into: Tensor, dtype: torch.dtype, sizes: tuple[int, ...], inside: Box) -> None:
    """Reads full rows and keeps the wanted columns; where all are wanted, straight into the target."""
    row = math.prod(sizes[1:]) * dtype.itemsize
    full = inside.sizes[1:] == sizes[1:]
    direct = full and into.is_contiguous() and into.device.type == "cpu" and into.dtype == dtype
    first, count = inside.offsets[0], inside.sizes[0]
    step = count if direct else max(SLAB // row, 1)
    for done in range(0, count, step):
        rows = min(step, count - done)
        target = into.narrow(0, done, rows)
        slab = target if direct else torch.empty((rows, *sizes[1:]), dtype=dtype)
        _read_exactly(file, start + (first + done) * row, bytes_of(slab))
        if not direct:
            target.copy_(Box((0, *inside.offsets[1:]), (rows, *inside.sizes[1:])).of(slab))


def _read_exactly(file: int, offset: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file, [into[:SLAB]], offset)
        if not count:
            raise CheckpointError("a file ends before its last tensor")
        into, offset = into[count:], offset + count
