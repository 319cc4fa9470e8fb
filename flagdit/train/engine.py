"""From a recipe and a place in the mesh to a model and the engine that owns its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flagdit.config.schema import Recipe
from flagdit.model.attention_backends import resolve_backend, uncompiled
from flagdit.model.block import TP_PLAN
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.initialize import initial_value
from flagdit.model.lora import add_adapters
from flagdit.parallel.context import ContextAttention
from flagdit.parallel.engine import Engine
from flagdit.parallel.local import LocalEngine
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.tensor import materialize, split_model
from flagdit.parallel.zero import ZeroEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Value = Callable[[str, torch.Size], Tensor]


def build_engine(
    recipe: Recipe, mesh: ParallelContext, longest: int = 0, value: Value | None = None
) -> tuple[FlagDiT, Engine]:
    """The model at step 0, spread over the mesh, and its engine.

    Args:
        longest: tokens of the longest sample, for the choice of the attention backend.
        value: name and shape of a whole parameter → its first fp32 value; None: from the recipe's seed.

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
    if recipe.lora.rank:
        add_adapters(model, recipe.lora)
    if recipe.train.compile:
        model.attention_backend = uncompiled(model.attention_backend)
        for block in model.blocks:
            block.compile()
    value = value or partial(initial_value, seed=recipe.seed)
    if alone:
        fill(model, value, dtype)
        return model, LocalEngine(model, recipe.optimizer, mesh.device, dtype)
    layout = split_model(model, TP_PLAN, mesh)
    materialize(model, layout, mesh, value, dtype)
    if mesh.context.size > 1:
        model.self_attention = ContextAttention(model.attention_backend, mesh)
    engine = ZeroEngine(model, layout, mesh, model.patch_dims, recipe.optimizer, recipe.parallel, value)
    return model, engine


@torch.no_grad()
def fill(model: FlagDiT, value: Value, dtype: torch.dtype) -> None:
    """Gives every parameter its value. Engines look after those that train; frozen ones get the compute dtype here."""
    for name, parameter in model.named_parameters():
        parameter.copy_(value(name, parameter.shape))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
