"""Packs on their way out of a loader process, in blocks of shared memory that are used again and again.

A tensor by itself costs a file, a mapping and a connection between the processes, and a pack has ten; new memory costs
a fault for every page, which takes longer than to read, check and cut a large sample. So patches are made in a block,
all else of a batch is copied into another, and the loader process takes them back when the last tensor in them is gone.
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
    """The shared memory of one loader process. A block's first byte tells whether somebody uses it.

    Attributes:
        taken: the blocks of the batch that is being made.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self.taken: list[Tensor] = []

    def empty(self, *shape: int, device: Any = None) -> Tensor:
        """`torch.empty` of fp32, in a block of its own; the device is the CPU."""
        place = Place(0, ALIGNED, torch.Size(shape), torch.float32)
        return place.of([self.take(ALIGNED + 4 * math.prod(shape))])

    def take(self, nbytes: int) -> Tensor:
        """A block of at least so many bytes, the first `ALIGNED` of which are not the taker's; in use until `free`."""
        fitting = [block for block in self._blocks if not block[0] and len(block) >= nbytes]
        if fitting:
            found = min(fitting, key=len)
        else:
            # What is too small now would be so again: packs of a run have about one size.
            self._blocks = [block for block in self._blocks if block[0]]
            found = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(nbytes + nbytes // 4))
            self._blocks.append(found)
        found[0] = 1
        self.taken.append(found)
        return found


def free(block: Tensor) -> None:
    """Gives a block back to its loader process."""
    block[0] = 0


def wrap(packs: Sequence[PackedBatch], blocks: Blocks) -> tuple[list[PackedBatch], list[Tensor]]:
    """Packs with places instead of tensors, and the blocks that hold these."""
    made = {block.untyped_storage().data_ptr(): i for i, block in enumerate(blocks.taken)}
    copied: list[tuple[Place, Tensor]] = []
    end = ALIGNED

    def place(x: Tensor) -> Place:
        nonlocal end
        block = made.get(x.untyped_storage().data_ptr())
        if block is not None:
            return Place(block, int(x.storage_offset()) * x.itemsize, x.shape, x.dtype)
        copied.append((Place(len(made), end, x.shape, x.dtype), x))
        end += -(-x.nbytes // ALIGNED) * ALIGNED
        return copied[-1][0]

    places = [map_tensors(pack, place) for pack in packs]
    blocks.take(end)
    taken, blocks.taken = blocks.taken, []
    for where, x in copied:
        where.of(taken).copy_(x)
    return places, taken


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
