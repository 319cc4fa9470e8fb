"""Packs on their way out of a loader process, in shared memory.

A tensor by itself costs a file, a mapping and a connection between the processes; a pack has ten, most of them small.
These are copied into one block. Patches that are large are made in shared memory from the first, and stay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from flagdit.batch import PackedBatch

ALIGNED = 64  # bytes: a line of the cache, and a multiple of every dtype
LARGE = 1 << 20  # bytes whose copy takes longer than a file of their own


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the block."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, block: Tensor) -> Tensor:
        """The tensor, a view of the block."""
        stop = self.start + self.shape.numel() * self.dtype.itemsize
        return block[self.start : stop].view(self.dtype).view(self.shape)


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


def empty(*shape: int, **options: Any) -> Tensor:
    """`torch.empty` of fp32, in a loader process in shared memory where it is large."""
    nbytes = math.prod(shape) * 4
    if nbytes < LARGE or get_worker_info() is None:
        return torch.empty(*shape, **options)
    return torch.empty(0).set_(torch.UntypedStorage._new_shared(nbytes)).view(shape)


def wrap(packs: Sequence[PackedBatch]) -> tuple[list[PackedBatch], Tensor]:
    """Packs with places instead of tensors that are not shared yet, and the shared block of bytes that holds these."""
    placed: list[tuple[Place, Tensor]] = []
    end = 0

    def place(x: Tensor) -> Tensor | Place:
        nonlocal end
        if x.is_shared():
            return x
        placed.append((Place(end, x.shape, x.dtype), x))
        end += -(-x.nbytes // ALIGNED) * ALIGNED
        return placed[-1][0]

    places = [map_tensors(pack, place) for pack in packs]
    block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(end))
    for where, x in placed:
        where.of(block).copy_(x)
    return places, block


def unwrap(packs: Sequence[PackedBatch], block: Tensor) -> list[PackedBatch]:
    """The inverse of `wrap`; tensors that had places are views of the block."""
    return [map_tensors(pack, lambda x: x.of(block) if isinstance(x, Place) else x) for pack in packs]
