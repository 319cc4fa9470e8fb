"""Packs on their way out of a loader process: all their tensors in one block of shared memory.

A tensor by itself costs a file, a mapping and a connection between the processes; a pack has ten, most of them small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flagdit.batch import PackedBatch

ALIGNED = 64  # bytes: a line of the cache, and a multiple of every dtype


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


def wrap(packs: Sequence[PackedBatch]) -> tuple[list[PackedBatch], Tensor]:
    """Packs with places instead of tensors, and the shared block of bytes that holds these."""
    placed: list[tuple[Place, Tensor]] = []
    end = 0

    def place(x: Tensor) -> Place:
        nonlocal end
        placed.append((Place(end, x.shape, x.dtype), x))
        end += -(-x.nbytes // ALIGNED) * ALIGNED
        return placed[-1][0]

    places = [map_tensors(pack, place) for pack in packs]
    block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(end))
    for where, x in placed:
        where.of(block).copy_(x)
    return places, block


def unwrap(packs: Sequence[PackedBatch], block: Tensor) -> list[PackedBatch]:
    """The inverse of `wrap`; the tensors are views of the block."""
    return [map_tensors(pack, lambda place: place.of(block)) for pack in packs]
