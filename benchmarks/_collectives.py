"""Counts what a rank hands to its process groups.

Every collective of torch.distributed, whoever calls it and by whatever name (megatron-core and DeepSpeed bind some at
import), ends in one operator of the c10d namespace. Counting there misses none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flagdit.parallel.mesh import ParallelContext

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "send": "send",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
}
"""Operator of c10d → what people call it. Receiving is no sending, so it is not here."""

SILENT = ("recv_", "recv_any_source_", "monitored_barrier_")


@dataclass
class Amount:
    """Calls of one kind, and the payload that this rank handed to them.

    Attributes:
        calls: how many.
        bytes: of what the rank contributes: the part in an all-gather, the whole tensor in an all-reduce,
            reduce-scatter or all-to-all, the message in a send.
    """

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.calls + other.calls, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Amount:
        return Amount(self.calls * times, self.bytes * times)


Traffic = dict[tuple[str, str], Amount]
"""(axis, kind) → amount."""


def leaving(kind: str, ranks: int) -> float:
    """Bytes that leave a rank for each byte of payload, by the usual ring algorithms."""
    rest = ranks - 1
    return {"all_reduce": 2 * rest / ranks, "all_gather": rest, "send": 1.0}.get(kind, rest / ranks)


class Count(TorchDispatchMode):
    """Counts collectives by axis and kind while it is entered. Groups of one rank are left out: nothing travels.

    Args:
        axes: name of a process group (torch's) → axis of the mesh.
    """

    def __init__(self, axes: Mapping[str, str]):
        super().__init__()
        self.axes, self.traffic = axes, defaultdict[tuple[str, str], Amount](Amount)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name not in SILENT:
            group = next(self._groups(args))
            if group.size() > 1:
                axis = self.axes.get(group.group_name, f"unknown group of {group.size()}")
                self.traffic[axis, KINDS.get(name, name)] += Amount(1, sum(x.nbytes for x in _payload(name, args)))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _groups(args: Any) -> Iterator[dist.ProcessGroup]:
        for arg in args:
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in arg._type().qualified_name():
                yield dist.ProcessGroup.unbox(arg)


def _payload(name: str, args: Any) -> list[Tensor]:
    """The tensors of a c10d operator that this rank contributes."""
    # Those with an output of their own name it first and their input second.
    two = name in ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_", "alltoall_", "allgather_")
    coalesced = ("reduce_scatter_", "allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_")
    source = args[1] if two or name in coalesced else args[0]
    return [x for x in tree_leaves(source) if isinstance(x, Tensor)] if name != "barrier" else []


def axes_of(mesh: ParallelContext) -> dict[str, str]:
    """Name of each process group → the axis it serves."""
    named = {"distinct": mesh.distinct, "tokens": mesh.tokens, "context": mesh.context, "ring": mesh.ring}
    named |= {"ulysses": mesh.ulysses, "data": mesh.data, "shards": mesh.shards, "tensor": mesh.tensor}
    found = {axis.group.group_name: name for name, axis in named.items() if axis.group is not None}
    return found | {dist.group.WORLD.group_name: "world"}
