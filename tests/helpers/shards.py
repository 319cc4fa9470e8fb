"""Shards of engines that hold everything, as tensors."""

from collections.abc import Mapping

from torch import Tensor

from flagdit.parallel.shards import Shard


def tensors_of(shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Name → the memory of a tensor of which this process holds all."""
    return {name: memory for name, shard in shards.items() for _, memory in shard.parts}
