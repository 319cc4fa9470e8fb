"""Packs on their way out of a loader process, in blocks of shared memory that are used again and again.

A tensor by itself costs a file, a mapping and a connection between the processes, and a pack has ten; new memory costs
a fault for every page, which takes longer than to read, check and cut a large sample. So a batch is made in one block,
which the loader process takes back when the last tensor in it is gone.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flagdit.batch import PackedBatch

ALIGNED = 64  # bytes: a line of the cache, and a multiple of every dtype
SMALLEST = 1 << 20  # bytes of a block; those that nobody writes to cost nothing


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: in which of a batch's blocks, and from which byte on."""

    block: int
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, blocks: Sequence[Tensor]) -> Tensor:
        """The tensor, a view of its block."""
        stop = self.start + self.shape.numel() * self.dtype.itemsize
        return blocks[self.block][self.start : stop].view(self.dtype).view(self.shape)


def map_tensors(batch: PackedBatch, change: Callable[[Any], Any]) -> PackedBatch:
    """The pack with every tensor (or its `Place`) changed, always in the same order."""
    layout: dict[str, Any] = {}
    for name, value in vars(batch.layout).items():
        if isinstance(value, (Tensor, Place)):
            layout[name] = change(value)
        elif isinstance(value, dict):
            layout[name] = {modality: change(x) for modality, x in value.items()}
    return replace(
        batch,
        layout=replace(batch.layout, **layout),
        patches={modality: change(x) for modality, x in batch.patches.items()},
        text=batch.text and replace(batch.text, features_MY=change(batch.text.features_MY)),
        labels_S=None if batch.labels_S is None else change(batch.labels_S),
    )


class Blocks:
    """The shared memory of one loader process, where it makes one batch after the other.

    A batch takes one block, or more where it is larger than those before. A block's first byte tells whether somebody
    uses it.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._taken: list[Tensor] = []  # of the batch that is being made
        self._ends = [0]  # bytes that are used of each, after none
        self._largest = 0  # bytes of a batch

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        """`torch.empty` in shared memory; the device is the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not self._taken or self._ends[-1] + nbytes > len(self._taken[-1]):
            self._taken.append(self._free_block(ALIGNED + nbytes))
            self._ends.append(ALIGNED)
        block, start = self._taken[-1], self._ends[-1]
        self._ends[-1] += -(-nbytes // ALIGNED) * ALIGNED
        return block[start : start + nbytes].view(dtype).view(shape)

    def share(self, x: Tensor) -> Tensor:
        """The tensor, or its copy in shared memory if it was not made here."""
        if _memory(x) in map(_memory, self._taken):
            return x
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def hand_over(self) -> list[Tensor]:
        """The used part of the blocks of this batch, whose taker gives them back by `free`; the next batch begins."""
        self._largest = max(self._largest, sum(self._ends))
        handed = [block[:end] for block, end in zip(self._taken, self._ends[1:], strict=True)]
        self._taken, self._ends = [], [0]
        return handed

    def _free_block(self, nbytes: int) -> Tensor:
        nbytes = max(nbytes, self._largest + self._largest // 4, SMALLEST)
        free_ones = (block for block in self._blocks if not block[0] and len(block) >= nbytes)
        found = next(free_ones, None)
        if found is None:
            # What is too small now would be so again: packs of a run have about one size.
            self._blocks = [block for block in self._blocks if block[0]]
            found = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(nbytes))
            self._blocks.append(found)
        found[0] = 1
        return found


def free(block: Tensor) -> None:
    """Gives a block back to its loader process."""
    block[0] = 0


def wrap(packs: Sequence[PackedBatch], blocks: Blocks) -> tuple[list[PackedBatch], list[Tensor]]:
    """Packs with places instead of tensors, and the blocks that hold these."""
    packs = [map_tensors(pack, blocks.share) for pack in packs]
    handed = blocks.hand_over()
    numbers = {_memory(block): i for i, block in enumerate(handed)}

    def place(x: Tensor) -> Place:
        return Place(numbers[_memory(x)], int(x.storage_offset()) * x.itemsize, x.shape, x.dtype)

    return [map_tensors(pack, place) for pack in packs], handed


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def unwrap(packs: Sequence[PackedBatch], blocks: Sequence[Tensor]) -> list[PackedBatch]:
    """The inverse of `wrap`. The tensors are views of the blocks, each of which is free when its last one is gone."""
    return place_in(packs, [_lent(block) for block in blocks])


def place_in(packs: Sequence[PackedBatch], blocks: Sequence[Tensor]) -> list[PackedBatch]:
    """Packs with the tensors that stand in the blocks instead of their places."""
    return [map_tensors(pack, lambda place: place.of(blocks)) for pack in packs]


def _lent(block: Tensor) -> Tensor:
    # A tensor made from an array keeps this very array alive, as do all tensors made from that one.
    array = block.numpy()[:]
    freed = weakref.finalize(array, _give_back, block, os.getpid())
    freed.atexit = False
    return torch.from_numpy(array)


def _give_back(block: Tensor, owner: int) -> None:
    # A process that was forked in between has copies of the arrays, and no say.
    if os.getpid() == owner:
        free(block)
