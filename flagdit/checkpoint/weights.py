"""The one door to the weights of a run: which tensors to look at, and how imported ones become a run.

Everything here speaks in whole tensors of the plain model, one at a time. Where and how a checkpoint keeps them is
known to `store` alone.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagdit.checkpoint import store
from flagdit.checkpoint.folders import STAGING
from flagdit.checkpoint.tensors import Derived, Entry, TensorSource
from flagdit.config.load import load_recipe, save_recipe
from flagdit.config.schema import LoraConfig, Recipe
from flagdit.errors import CheckpointError, RecipeError
from flagdit.model.lora import A, B, merged

ORIGIN = "imported"
"""Key of a checkpoint's state that says where imported weights come from."""


@dataclass(frozen=True)
class Weights:
    """The weights of a run at one step.

    Attributes:
        recipe: of the run.
        step: of the checkpoint.
        group: which of its weights: `model` or an average.
        state: the checkpoint's counters.
        tensors: parameters of the plain model; adapters are merged.
        fingerprint: tells two sets of weights apart.
    """

    recipe: Recipe
    step: int
    group: str
    state: dict[str, Any]
    tensors: TensorSource
    fingerprint: str


def open_weights(run_dir: Path | str, *, step: int | None = None, ema: int | None = None) -> Weights:
    """The weights to sample from, to export or to start from.

    Args:
        run_dir: the run folder.
        step: of the checkpoint; None: the newest.
        ema: which of train.ema_decays; −1: the raw weights; None: as the recipe's sample.ema says.

    Raises:
        CheckpointError: no run, no checkpoint, or a damaged one; or the weights that adapters belong to are gone.
        RecipeError: no such average.
    """
    run_dir = Path(run_dir)
    recipe = load_run_recipe(run_dir)
    group = weights_group(recipe, recipe.sample.ema if ema is None else ema)
    folder = store.find(run_dir, step)
    checkpoint = store.load(folder, groups=[group])
    tensors, fingerprint = store.open_group(folder, group), store.fingerprint(folder, group)
    if recipe.lora.rank:
        base = open_base(recipe)
        if base is None or base.fingerprint != checkpoint.state["base"]:
            raise CheckpointError(
                f"the adapters of this run belong to other weights than train.init_from={recipe.train.init_from} holds",
                where=str(run_dir),
                fix="Put the weights that it was started from back, or change train.init_from in its recipe.yaml.",
            )
        tensors = merge_adapters(base.tensors, tensors, recipe.lora)
    return Weights(recipe, checkpoint.step, group, checkpoint.state, tensors, fingerprint)


def open_base(recipe: Recipe) -> Weights | None:
    """The weights that a run starts from; None: from the seed.

    Raises:
        CheckpointError: train.init_from is not a run, or its network is another.
    """
    if recipe.train.init_from is None:
        return None
    try:
        return open_weights(recipe.train.init_from, ema=recipe.train.init_ema)
    except (CheckpointError, RecipeError) as error:
        raise type(error)(f"train.init_from={recipe.train.init_from}: {error.what}", fix=error.fix) from None


def merge_adapters(base: TensorSource, adapters: TensorSource, cfg: LoraConfig) -> TensorSource:
    """Weights with the adapters added: W + alpha/rank·B·A, in fp32.

    Raises:
        CheckpointError: an adapter belongs to no weight.
    """
    owners = {
        name.removesuffix(f".{A}.weight") + ".weight" for name in adapters.entries if name.endswith(f"{A}.weight")
    }
    if lost := sorted(owners - base.entries.keys()):
        raise CheckpointError(f"there are adapters for {', '.join(lost[:3])}, which the model does not have")
    entries = {
        name: Entry(entry.shape, torch.float32) if name in owners else entry for name, entry in base.entries.items()
    }

    def read(name: str) -> Tensor:
        weight = base.read(name)
        if name not in owners:
            return weight
        module = name.removesuffix(".weight")
        return merged(weight, adapters.read(f"{module}.{A}.weight"), adapters.read(f"{module}.{B}.weight"), cfg)

    return Derived(entries, read)


def write_run(run_dir: Path, recipe: Recipe, step: int, tensors: TensorSource, origin: Mapping[str, Any]) -> None:
    """Makes a run folder out of weights: it samples, exports and is a place for train.init_from to point to.

    Written aside and put in place at the end, so that a failure leaves nothing.

    Args:
        run_dir: the folder; must not exist.
        recipe: of the run; its network is that of the tensors.
        step: optimizer steps that the weights have seen.
        tensors: parameters of the plain model.
        origin: where they come from, for people.

    Raises:
        CheckpointError: the folder exists or cannot be written, or a tensor cannot be read.
    """
    if run_dir.exists():
        raise CheckpointError("the folder exists", where=str(run_dir), fix="Choose another one, or remove it.")
    staging = run_dir.with_name(f"{STAGING}{run_dir.name}-{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        save_recipe(recipe, staging / "recipe.yaml")
        store.save(staging, step, {"model": tensors}, {ORIGIN: dict(origin)})
        os.rename(staging, run_dir)
    except OSError as error:
        raise CheckpointError(f"the run cannot be written: {error.strerror}", where=str(run_dir)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_run_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        CheckpointError: there is no run.
        RecipeError: its recipe cannot be read.
    """
    path = run_dir / "recipe.yaml"
    try:
        exists = path.is_file()
    except OSError as error:
        raise CheckpointError(f"the run folder cannot be read: {error.strerror}", where=str(run_dir)) from None
    if not exists:
        raise CheckpointError(
            "there is no run here" if run_dir.is_dir() else "there is no such folder",
            where=str(run_dir),
            fix="Give the folder of a run, such as runs/quickstart; it holds recipe.yaml and checkpoints/.",
        )
    return load_recipe(path)


def weights_group(recipe: Recipe, ema: int) -> str:
    """Name of the tensors to sample from, in a checkpoint.

    Raises:
        RecipeError: no such average.
    """
    decays = recipe.train.ema_decays
    if ema < 0 or not decays:
        return "model"
    if ema >= len(decays):
        raise RecipeError(
            f"there is no average number {ema}",
            where="sample.ema",
            fix=f"train.ema_decays={decays} are counted from 0; -1 is the raw weights.",
        )
    return f"ema_{decays[ema]}"
