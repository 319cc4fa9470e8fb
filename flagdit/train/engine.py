"""From a recipe and a place in the mesh to a model and the engine that owns its weights."""

from __future__ import annotations

from functools import partial

import torch

from flagdit.config.schema import Recipe
from flagdit.model.attention_backends import choose_backend
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


def build_engine(recipe: Recipe, mesh: ParallelContext) -> tuple[FlagDiT, Engine]:
    """The model at step 0, spread over the mesh, and its engine."""
    dtype = DTYPES[recipe.train.precision]
    if mesh.world == 1:
        model = FlagDiT(recipe.model)
        initialize(model, recipe.seed)
        _compile(model, recipe)
        return model, LocalEngine(model, recipe.optimizer, mesh.device, dtype)
    with torch.device("meta"):
        model = FlagDiT(recipe.model)
    layout = split_model(model, TP_PLAN, mesh)
    value = partial(initial_value, seed=recipe.seed)
    materialize(model, layout, mesh, value, dtype)
    if mesh.context.size > 1:
        backend = choose_backend(mesh.device, dtype, model.cfg.dim // model.cfg.num_heads)
        model.self_attention = ContextAttention(backend, mesh)
    _compile(model, recipe)
    engine = ZeroEngine(model, layout, mesh, model.patch_dims, recipe.optimizer, recipe.parallel, value)
    return model, engine


def _compile(model: FlagDiT, recipe: Recipe) -> None:
    if recipe.train.compile:
        for block in model.blocks:
            block.compile()
