"""The first weights of a run: from the seed, or from another run, with or without adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flagdit.checkpoint import store
from flagdit.checkpoint.lumina import compare, expected_shapes
from flagdit.checkpoint.weights import open_base
from flagdit.config.schema import ModelConfig, Recipe
from flagdit.errors import RecipeError
from flagdit.model.initialize import initial_value
from flagdit.model.lora import is_adapter
from flagdit.model.sizes import resolve

MAY_DIFFER = ("size", "attention", "kernels", "checkpointing", "checkpoint_every", "rope_theta")
"""Keys of the network that change neither its parameters nor, but for deliberate changes of RoPE, what it computes."""


@dataclass(frozen=True)
class Start:
    """Where first values come from.

    Attributes:
        value: name and shape of a whole parameter → its fp32 value, on the CPU.
        fingerprint: of the frozen weights that adapters stand on; None without adapters.
    """

    value: Callable[[str, torch.Size], Tensor]
    fingerprint: str | None


def first_values(recipe: Recipe, folder: Path) -> Start:
    """What every parameter of a run is before its first step.

    Args:
        recipe: train.init_from, lora, seed.
        folder: of the run; a checkpoint in it makes reading the first weights needless, unless adapters stand on them.

    Raises:
        CheckpointError: train.init_from cannot be read or does not fit.
        RecipeError: it is another network.
    """
    from_seed = partial(initial_value, seed=recipe.seed)
    base = None if store.latest(folder) and not recipe.lora.rank else open_base(recipe)
    if base is None:
        return Start(from_seed, None)
    _same_network(base.recipe.model, recipe.model)
    compare(base.tensors.entries, expected_shapes(recipe.model))
    read = base.tensors.read

    def value(name: str, shape: torch.Size) -> Tensor:
        return from_seed(name, shape) if is_adapter(name) else read(name).float()

    return Start(value, base.fingerprint if recipe.lora.rank else None)


def _same_network(theirs: ModelConfig, ours: ModelConfig) -> None:
    a, b = dataclasses.asdict(resolve(theirs)), dataclasses.asdict(resolve(ours))
    changed = [f"model.{k} is {a[k]} there and {b[k]} here" for k in a if a[k] != b[k] and k not in MAY_DIFFER]
    if changed:
        raise RecipeError(
            f"train.init_from holds another network: {'; '.join(changed)}",
            fix="Start from its recipe: `base: PATH/recipe.yaml`, or flagdit train PATH/recipe.yaml name=….",
        )
