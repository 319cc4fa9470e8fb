"""What one rank holds of a tensor: rectangles of the whole, with the memory that keeps them.

ZeRO keeps flat slices of a tensor rank's part of a parameter. A slice that starts or ends inside a row is up to three
rectangles: the rest of a row, full rows, the beginning of a row. Rectangles of the whole tensor mean the same on every
mesh, so a checkpoint is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor.

    Attributes:
        offsets: where it begins, along each dimension.
        sizes: how far it reaches.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def moved(self, by: Sequence[int]) -> Box:
        return Box(tuple(at + step for at, step in zip(self.offsets, by, strict=True)), self.sizes)

    def of(self, whole: Tensor) -> Tensor:
        """The rectangle of a whole tensor, as a view."""
        for dim, (at, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, at, size)
        return whole


@dataclass(frozen=True)
class Shard:
    """This rank's part of a tensor; none at all is a part too.

    Attributes:
        shape, dtype: of the whole tensor.
        parts: disjoint rectangles and their memory: views, written in place when a checkpoint is loaded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[Box, Tensor], ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Shard:
        """All of a tensor."""
        shape = tuple(tensor.shape)
        return cls(shape, tensor.dtype, ((Box((0,) * len(shape), shape), tensor.detach()),))

    @classmethod
    def slice(
        cls, shape: Sequence[int], flat: Tensor, start: int, local: Sequence[int], origin: Sequence[int]
    ) -> Shard:
        """A flat slice of a rectangle.

        Args:
            shape: of the whole tensor.
            flat: the slice's memory, contiguous, one dimension.
            start: where the slice begins in the flattened rectangle.
            local: shape of the rectangle, a tensor rank's part of the whole.
            origin: where that begins in the whole.
        """
        parts, at = [], 0
        for box in boxes_of_slice(tuple(local), start, start + flat.numel()):
            parts.append((box.moved(origin), flat.narrow(0, at, box.numel).view(box.sizes)))
            at += box.numel
        return cls(tuple(shape), flat.dtype, tuple(parts))

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's parts."""
        return sum(memory.nbytes for _, memory in self.parts)

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Takes this rank's parts out of a whole tensor."""
        for box, memory in self.parts:
            memory.copy_(box.of(whole))


Shards = dict[str, Shard]


def whole_shards(tensors: Mapping[str, Tensor]) -> Shards:
    """Tensors of which this process holds all."""
    return {name: Shard.whole(tensor) for name, tensor in tensors.items()}


def boxes_of_slice(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The rectangles that elements start … stop − 1 of a flattened tensor make up, in order; at most 2·dims − 1."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # full rows
    if first > last:  # inside one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * inner)
    if first < last:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    yield from _in_row(shape, last, last * inner, stop)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    begin = row * math.prod(shape[1:])
    for box in boxes_of_slice(shape[1:], start - begin, stop - begin):
        yield Box((row, *box.offsets), (1, *box.sizes))
