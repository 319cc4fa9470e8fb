"""Sampling on several ranks: a model split by heads, a sample split by tokens, prompts split among the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from flagdit.checkpoint.tensors import TensorSource
from flagdit.config.schema import Recipe
from flagdit.errors import RecipeError
from flagdit.model.attention_backends import choose_backend
from flagdit.model.block import TP_PLAN
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.sizes import resolve
from flagdit.parallel.context import ContextAttention, WholeModel
from flagdit.parallel.mesh import Launch, ParallelContext, check_mesh, mesh_of
from flagdit.parallel.tensor import materialize, split_model


@contextmanager
def sampling_mesh(recipe: Recipe, *, tensor: int, context: int) -> Iterator[ParallelContext]:
    """Joins the ranks that torchrun started; one process is a mesh of its own.

    Args:
        recipe: of the run; its own `parallel` block, which is of training, does not count.
        tensor: ranks that split every block.
        context: ranks that split a sample's tokens. They exchange heads as far as there are heads for all, and pass
            keys and values around otherwise.

    Raises:
        RecipeError: a mesh that the model or the number of ranks does not fit.
    """
    world = Launch.from_environment().world
    model = resolve(recipe.model)
    ring = context // math.gcd(model.num_heads // tensor or 1, context)
    recipe = replace(
        recipe,
        model=model,
        parallel=replace(recipe.parallel, tensor=tensor, context=context, ring=ring),
        data=replace(recipe.data, batch_size=world),
        train=replace(recipe.train, accumulation=1),
    )
    check_mesh(recipe, world)
    device = "cuda" if torch.cuda.is_available() and recipe.train.device != "cpu" else "cpu"
    with mesh_of(recipe, device) as mesh:
        yield mesh


def place(recipe: Recipe, weights: TensorSource, mesh: ParallelContext, dtype: torch.dtype) -> WholeModel:
    """A model spread over a mesh, called by all its ranks with the same whole packs.

    So everything above it, guidance, solvers and canvases, runs on every rank alike and knows nothing of the mesh.
    """
    with torch.device("meta"):
        model = FlagDiT(recipe.model)
    layout = split_model(model, TP_PLAN, mesh)
    materialize(model, layout, mesh, lambda name, shape: weights.read(name), dtype)
    model = model.eval().requires_grad_(False)
    head_dim = model.cfg.dim // model.cfg.num_heads
    model.attention_backend = choose_backend(mesh.device, dtype, head_dim, first=recipe.model.attention)
    if mesh.context.size > 1:
        model.self_attention = ContextAttention(model.attention_backend, mesh)
    return WholeModel(model, mesh, model.patch_dims)


def check_one_sample(mesh: ParallelContext) -> None:
    """Whether all ranks draw one sample together.

    Raises:
        RecipeError: some would draw the same as others.
    """
    if mesh.data.size > 1:
        raise RecipeError(
            f"{mesh.data.size} ranks would draw the same",
            fix="Raise --tensor or --context, or sample into --out-dir, where ranks share the prompts.",
        )


def speaks(mesh: ParallelContext) -> bool:
    """Whether this rank writes, among those that draw the same sample together."""
    return mesh.tensor.rank == 0 and mesh.context.rank == 0
