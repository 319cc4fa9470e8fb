"""Weights of other programs as a run: it samples, exports, and training starts from it (train.init_from)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flagdit.checkpoint.formats import RUN, open_any
from flagdit.checkpoint.progress import counted, progress
from flagdit.checkpoint.weights import write_run
from flagdit.config.load import load_recipe, save_recipe
from flagdit.config.schema import Recipe
from flagdit.errors import CheckpointError
from flagdit.model.sizes import resolve

GB = 10**9


def import_weights(
    source: Path,
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    weights: str | None = None,
    heads: int | None = None,
) -> str:
    """Makes a run folder out of an official checkpoint, a diffusers folder or an export of ours.

    Tensors keep their dtype and their bits.

    Args:
        source: the folder.
        run_dir: the run to make; must not exist.
        overrides: recipe keys to set, such as codec.path=FOLDER.
        weights: ema or raw, where there are both; None: the average if there is one.
        heads: query heads of an official network without text; None: 32.

    Returns:
        What was made, for people.

    Raises:
        CheckpointError: see `open_any` and `write_run`.
        RecipeError: overrides that a recipe does not have, or that contradict the network.
    """
    opened = open_any(source, weights=weights, heads=heads)
    if opened.kind == RUN:
        raise CheckpointError("this is a run already", where=str(source), fix="Use it as it is, or export it.")
    named = replace(opened.recipe, name=run_dir.name, run_dir=str(run_dir.parent))
    recipe = with_overrides(named, overrides)
    if resolve(recipe.model) != resolve(named.model):
        raise CheckpointError(
            "the network is what the weights say; model.* cannot be overridden",
            fix="Override the keys of codec, text and sample only.",
        )
    with progress("importing", opened.tensors.nbytes) as advance:
        origin = {"format": opened.kind, "name": source.resolve().name}
        write_run(run_dir, recipe, opened.step, counted(opened.tensors, advance), origin)
    size = sum(entry.numel for entry in opened.tensors.entries.values())
    return f"{run_dir}: {opened.kind}, {size:,} parameters, {opened.tensors.nbytes / GB:.2f} GB, step {opened.step}"


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `key=value` applied, checked as every recipe is.

    Raises:
        RecipeError: lists all that is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{recipe.name}.yaml"
        save_recipe(recipe, file)
        return load_recipe(file, overrides)
