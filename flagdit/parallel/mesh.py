"""The mesh of a run: which ranks share a block's weights, which share a pack, which hold different data.

Ranks count with the tensor axis fastest, then context, then data, so that the axis that talks most sits on one node:

    rank = (data · context_size + context) · tensor_size + tensor

The tokens of a pack are split over context × tensor: context rank c holds the c-th of equal contiguous ranges, and
under sequence parallelism its tensor ranks hold equal parts of that range. Inside the context axis, neighbouring ranks
exchange heads (Ulysses, arXiv 2309.14509) and ranks `ulysses` apart pass keys and values around (ring attention, arXiv
2310.01889).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flagdit.config.problems import Problem, divisors, nearest_values, raise_problems
from flagdit.config.schema import Recipe
from flagdit.parallel.ranks import ALONE, Ranks

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh, seen from this rank.

    Attributes:
        size: ranks along it.
        rank: this rank's place.
        group: the process group; None where there is one rank only.
    """

    size: int = 1
    rank: int = 0
    group: Group = None


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the mesh, and the groups it talks to.

    Attributes:
        rank, world: among all processes of the run.
        device: where this rank computes.
        tensor: ranks that split the heads and hidden channels of every block.
        context: ranks that split the tokens of a pack; `ulysses` × `ring`.
        ulysses, ring: the parts of the context axis that exchange heads and that pass keys and values around.
        data: ranks that hold different packs.
        shards: data × context: the ranks over which ZeRO splits states, since their weights are the same.
        tokens: ranks that hold different tokens of one pack: context, times tensor under sequence parallelism.
        distinct: ranks that hold different tokens or different packs: tokens × data.
        sequence: the residual stream is split over the tensor axis too.
        timeout: after which a silent rank counts as hanging.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tensor: Axis = Axis()
    context: Axis = Axis()
    ulysses: Axis = Axis()
    ring: Axis = Axis()
    data: Axis = Axis()
    shards: Axis = Axis()
    tokens: Axis = Axis()
    distinct: Axis = Axis()
    sequence: bool = False
    timeout: timedelta = timedelta(seconds=600)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run: it alone writes files and talks to people."""
        return self.rank == 0

    @property
    def holds_first_tokens(self) -> bool:
        """Whether this rank speaks for its pack: no other rank with the same pack does."""
        return self.tensor.rank == 0 and self.context.rank == 0

    def sum_tokens(self, value: Tensor) -> Tensor:
        """The sum over the ranks that hold other tokens of the same pack."""
        if self.tokens.group is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.tokens.group)
        return total

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        if self.world == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return Ranks(self.rank, self.world).from_first(value)

    def from_all(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank."""
        return Ranks(self.rank, self.world).from_all(value)

    def own_group(self) -> Ranks:
        """All ranks with a new group, in which messages do not meet those of training. All ranks call it."""
        if self.world == 1:
            return ALONE
        return Ranks(self.rank, self.world, dist.new_group(backend="gloo", timeout=self.timeout))


@dataclass(frozen=True)
class Launch:
    """What torchrun's environment says about this process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set."""
        names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        return cls(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})


def check_mesh(recipe: Recipe, world: int) -> None:
    """Whether the recipe's `parallel` block fits the model, the batch and the number of ranks.

    Args:
        recipe: its `model` has its size applied (`model/sizes.py`, `resolve`).
        world: ranks of the run.

    Raises:
        RecipeError: lists every mismatch with the keys at fault and the nearest values that fit.
    """
    raise_problems(list(mesh_problems(recipe, world)), recipe.name)


def mesh_problems(recipe: Recipe, world: int) -> Iterator[Problem]:
    """All that `check_mesh` finds."""
    m, p = recipe.model, recipe.parallel
    kv_heads, hidden = m.num_kv_heads or m.num_heads, m.ffn_dim
    for key, value in (("num_heads", m.num_heads), ("num_kv_heads", kv_heads), ("ffn_dim", hidden), ("dim", m.dim)):
        if value and value % p.tensor:
            yield Problem(
                ("parallel.tensor", f"model.{key}"),
                f"parallel.tensor={p.tensor} must divide model.{key}={value}; "
                f"{nearest_values(p.tensor, divisors(value))}",
            )
    if p.context % p.ring:
        yield Problem(
            ("parallel.ring", "parallel.context"),
            f"parallel.ring={p.ring} must divide parallel.context={p.context}; "
            f"{nearest_values(p.ring, divisors(p.context))}",
        )
    ulysses, heads = p.context // p.ring, m.num_heads // p.tensor
    if p.context % p.ring == 0 and m.num_heads % p.tensor == 0 and heads % ulysses:
        yield Problem(
            ("parallel.context", "parallel.ring", "model.num_heads"),
            f"parallel.context={p.context} with parallel.ring={p.ring} exchanges heads among {ulysses} ranks, which "
            f"must divide the {heads} heads of a tensor rank; set parallel.ring="
            f"{p.context // max(d for d in divisors(ulysses) if heads % d == 0)}, or change parallel.context",
        )
    shared = p.tensor * p.context
    if world % shared:
        fitting = nearest_values(world, [shared * n for n in range(1, world + 2)])
        yield Problem(
            ("parallel.tensor", "parallel.context"),
            f"parallel.tensor={p.tensor} × parallel.context={p.context} = {shared} ranks hold one pack, which must "
            f"divide the {world} ranks of the run; {fitting} ranks, or change the mesh",
        )
        return
    data, parts = world // shared, recipe.train.accumulation
    if recipe.data.batch_size % (data * parts):
        near = nearest_values(recipe.data.batch_size, [data * parts * n for n in range(1, recipe.data.batch_size + 2)])
        yield Problem(
            ("data.batch_size", "train.accumulation"),
            f"data.batch_size={recipe.data.batch_size} must be a multiple of {data} data ranks × train.accumulation="
            f"{parts}; {near}",
        )


@contextmanager
def mesh_of(recipe: Recipe, device_type: str) -> Iterator[ParallelContext]:
    """Joins the run's ranks and forms its groups; leaves them at the end. One process forms none.

    Args:
        recipe: checked by `check_mesh`.
        device_type: cpu or cuda.
    """
    # megatron-core and DeepSpeed call collectives by names that newer versions of torch rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    launch, p = Launch.from_environment(), recipe.parallel
    device = torch.device(device_type, launch.local_rank) if device_type == "cuda" else torch.device(device_type)
    if launch.world == 1:
        yield ParallelContext(device=device)
        return
    if device_type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=p.timeout)
    joins = not dist.is_initialized()
    if joins:
        # Objects and flags travel over gloo, so that they never wait for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core mentions libraries that it could use
            from megatron.core import parallel_state
        yield _form(recipe, launch, device, timeout)
    finally:
        parallel_state.destroy_model_parallel()
        if joins:
            dist.destroy_process_group()


def _form(recipe: Recipe, launch: Launch, device: torch.device, timeout: timedelta) -> ParallelContext:
    from megatron.core import parallel_state

    p = recipe.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor,
        context_parallel_size=p.context,
        distributed_timeout_minutes=max(1, p.timeout // 60),
    )
    sequence = p.sequence and p.tensor > 1
    data = launch.world // (p.tensor * p.context)
    grid_DRUT = torch.arange(launch.world).view(data, p.ring, p.context // p.ring, p.tensor)
    tensor = _axis(parallel_state.get_tensor_model_parallel_group())
    shards = _axis(parallel_state.get_data_parallel_group(with_context_parallel=True))
    ulysses = _new_axis(grid_DRUT.permute(0, 1, 3, 2).flatten(0, 2), timeout)
    ring = _new_axis(grid_DRUT.permute(0, 2, 3, 1).flatten(0, 2), timeout)
    together = _new_axis(grid_DRUT.flatten(1)[:, :], timeout) if sequence else None
    context = _axis(parallel_state.get_context_parallel_group())
    everyone = Axis(launch.world, launch.rank, dist.group.WORLD)
    return ParallelContext(
        rank=launch.rank,
        world=launch.world,
        device=device,
        tensor=tensor,
        context=context,
        ulysses=ulysses,
        ring=ring,
        data=_axis(parallel_state.get_data_parallel_group()),
        shards=shards,
        tokens=together or context,
        distinct=everyone if sequence else shards,
        sequence=sequence,
        timeout=timeout,
    )


def _axis(group: dist.ProcessGroup) -> Axis:
    size = dist.get_world_size(group)
    return Axis(size, dist.get_rank(group), group if size > 1 else None)


def _new_axis(ranks_GN: torch.Tensor, timeout: timedelta) -> Axis:
    """This rank's axis among G groups of N ranks each."""
    if ranks_GN.shape[1] == 1:
        return Axis()
    group, _ = dist.new_subgroups_by_enumeration(ranks_GN.tolist(), timeout=timeout)
    return _axis(group)
