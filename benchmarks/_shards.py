"""Whole tensors from the shards of all ranks, for comparison; small models only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.shards import Shard


def gathered(mesh: ParallelContext, shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Whole tensors, on every rank."""
    parts = {name: [(box, memory.cpu().clone()) for box, memory in shard.parts] for name, shard in shards.items()}
    everyone = mesh.from_all(parts)
    whole = {}
    for name, shard in shards.items():
        tensor = torch.full(shard.shape, torch.nan, dtype=shard.dtype)
        for of_rank in everyone:
            for box, memory in of_rank[name]:
                box.of(tensor).copy_(memory)
        whole[name] = tensor
    return whole
