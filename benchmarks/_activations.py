"""Forward and backward of one rank, followed byte by byte: for real, or traced with tensors that have no memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from _live_bytes import LiveBytes
from torch import Tensor

from flagdit.batch import PackedBatch
from flagdit.config.schema import Recipe
from flagdit.flow.objective import FlowMatching
from flagdit.flow.path import PathSample, between
from flagdit.model.block import TP_PLAN
from flagdit.model.flag_dit import FlagDiT
from flagdit.parallel.context import ContextAttention, share
from flagdit.parallel.mesh import ParallelContext, mesh_of
from flagdit.parallel.tensor import materialize, split_model
from flagdit.train.engine import DTYPES


def build(recipe: Recipe, mesh: ParallelContext, backend: Any, value: Callable[[str, torch.Size], Tensor]) -> FlagDiT:
    """The model of a run on its mesh, without an engine: a gradient is dropped as soon as it is there."""
    with torch.device("meta"):
        model = FlagDiT(recipe.model)
    materialize(model, split_model(model, TP_PLAN, mesh), mesh, value, DTYPES[recipe.train.precision])
    model.attention_backend = backend
    if mesh.context.size > 1:
        model.self_attention = ContextAttention(backend, mesh)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(_drop)
    return model


def _drop(p: Tensor) -> None:
    p.grad = None


def follow(recipe: Recipe, model: FlagDiT, batch: PackedBatch, path: PathSample) -> LiveBytes:
    """Forward and backward of a rank's part of a pack, its inputs included."""
    inputs = [
        *batch.patches.values(),
        *path.x_t.values(),
        *path.velocity.values(),
        path.t_S,
        *([batch.text.features_MY] if batch.text else []),
    ]
    with LiveBytes(workspace={"flagdit::packed_attention_backward": _query_gradient}) as live:
        for x in inputs:
            live.add(x)
        FlowMatching(recipe.flow).loss(model, batch, path).total.backward()
    return live


def _query_gradient(grad: Tensor, *_: Any) -> int:
    """Flash kernels sum the gradient of the queries in fp32, inside their backward pass."""
    return grad.numel() * 4


def measure(recipe: Recipe, mesh: ParallelContext, backend: Any, whole: PackedBatch) -> LiveBytes:
    """This rank's part of a pack, with real tensors."""
    torch.manual_seed(0)
    model = build(recipe, mesh, backend, lambda _, shape: 0.02 * torch.randn(shape))
    batch = _part(recipe, mesh, whole)
    noise = {m: torch.randn_like(x) for m, x in batch.patches.items()}
    return follow(recipe, model, batch, between(batch, noise, torch.rand(len(batch.segments))))


def trace(recipe: Recipe, rank: int, backend: Any, whole: PackedBatch) -> tuple[LiveBytes, int, int]:
    """The same, pretending: fake tensors have shapes and no memory, collectives of a fake process group return at once.

    Args:
        rank: of tensor × context ranks.

    Returns:
        The bytes; elements of the rank's parts of all parameters; ranks over which their states would be split.
    """
    from torch._subclasses import FakeTensorMode

    with _pretended(recipe, rank) as mesh:
        # The layout of a pack is read in Python, so it is real; whatever the model makes of it is fake.
        batch = _part(recipe, mesh, whole)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build(recipe, mesh, backend, lambda _, shape: torch.empty(shape))
            noise = {m: torch.empty_like(x) for m, x in batch.patches.items()}
            live = follow(recipe, model, batch, between(batch, noise, torch.empty(len(batch.segments))))
        return live, sum(p.numel() for p in model.parameters()), mesh.shards.size


def _part(recipe: Recipe, mesh: ParallelContext, whole: PackedBatch) -> PackedBatch:
    if mesh.world == 1:
        return whole
    with torch.device("meta"):
        patch_dims = FlagDiT(recipe.model).patch_dims
    return share(whole, mesh, patch_dims)


@contextmanager
def _pretended(recipe: Recipe, rank: int) -> Iterator[ParallelContext]:
    """A place in a mesh whose other ranks do not exist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core mentions libraries that it could use
        from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = recipe.parallel.tensor * recipe.parallel.context
    if world == 1:
        yield ParallelContext()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    # megatron-core would form gloo groups beside its own, which cannot pretend.
    form = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % 8)}
    try:
        with (
            patch.dict(os.environ, place),
            patch.object(parallel_state, "initialize_model_parallel", form),
            mesh_of(recipe, "cpu") as mesh,
        ):
            yield mesh
    finally:
        dist.destroy_process_group()
