"""From a recipe and a place in the mesh to a model and the engine that owns its weights."""

from __future__ import annotations

from functools import partial

import torch

from flagdit.config.schema import Recipe
from flagdit.model.attention_backends import resolve_backend, uncompiled
from flagdit.model.block import TP_PLAN
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.initialize import initial_value, initialize
from flagdit.parallel.context import ContextAttention
from flagdit.parallel.engine import Engine
from flagdit.parallel.local import LocalEngine
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.tensor import materialize, split_model
from flagdit.parallel.zero import ZeroEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_engine(recipe: Recipe, mesh: ParallelContext, longest: int = 0) -> tuple[FlagDiT, Engine]:
    """The model at step 0, spread over the mesh, and its engine.

    Args:
        longest: tokens of the longest sample, for the choice of the attention backend.

    Raises:
        RecipeError: an impossible shape, or an attention backend that cannot serve here.
    """
    dtype = DTYPES[recipe.train.precision]
    alone = mesh.world == 1
    with torch.device(mesh.device if alone else "meta"):
        model = FlagDiT(recipe.model)
    model.attention_backend = resolve_backend(
        model.cfg,
        mesh.device,
        dtype,
        lse=mesh.ring.size > 1,
        deterministic=recipe.train.deterministic,
        longest=longest,
    )
    if recipe.train.compile:
        model.attention_backend = uncompiled(model.attention_backend)
        for block in model.blocks:
            block.compile()
    if alone:
        initialize(model, recipe.seed)
        return model, LocalEngine(model, recipe.optimizer, mesh.device, dtype)
    layout = split_model(model, TP_PLAN, mesh)
    value = partial(initial_value, seed=recipe.seed)
    materialize(model, layout, mesh, value, dtype)
    if mesh.context.size > 1:
        model.self_attention = ContextAttention(model.attention_backend, mesh)
    engine = ZeroEngine(model, layout, mesh, model.patch_dims, recipe.optimizer, recipe.parallel, value)
    return model, engine
