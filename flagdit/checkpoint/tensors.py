"""Named tensors that are read one at a time: what import, export, diff and inspect see of any checkpoint.

A model of many gigabytes passes through here with one tensor in memory. Whoever keeps checkpoints in another form
(several files, shards of many ranks, a pickle) derives from `TensorSource`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        return cls(tuple(tensor.shape), tensor.dtype)


class TensorSource(ABC):
    """Tensors by name.

    Attributes:
        entries: name → shape and dtype, known without reading.
    """

    entries: Mapping[str, Entry]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU; the caller owns its memory.

        Raises:
            CheckpointError: it cannot be read.
        """

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, read when its turn comes."""
        for name in self.entries:
            yield name, self.read(name)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


class InMemory(TensorSource):
    """A state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.entries = {name: Entry.of(x) for name, x in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().to("cpu")


class Derived(TensorSource):
    """Tensors computed from others when they are asked for: renamed, reordered, cast, merged.

    Args:
        entries: what `read` will return.
        read: name → tensor.
    """

    def __init__(self, entries: Mapping[str, Entry], read: Callable[[str], Tensor]):
        self.entries, self._read = entries, read

    def read(self, name: str) -> Tensor:
        tensor = self._read(name)
        assert Entry.of(tensor) == self.entries[name], f"{name}: {Entry.of(tensor)} instead of {self.entries[name]}"
        return tensor


def cast(source: TensorSource, dtype: torch.dtype | None) -> TensorSource:
    """The same tensors in another dtype; None: as they are."""
    if dtype is None:
        return source
    entries = {name: Entry(entry.shape, dtype) for name, entry in source.entries.items()}
    return Derived(entries, lambda name: source.read(name).to(dtype))


def in_order(source: TensorSource) -> list[str]:
    """Names in the order of files: wide dtypes first, so that every tensor is aligned, then by natural order, in
    which `blocks.2` stands before `blocks.10`."""
    return sorted(source.entries, key=lambda name: (-source.entries[name].dtype.itemsize, natural(name)))


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that takes the numbers in a dotted name as numbers."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in name.split("."))
