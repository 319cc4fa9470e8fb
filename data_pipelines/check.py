"""Does the data set suit the recipe? Asked before training starts; every fault is named at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flagdit.codecs.modality import codec_spec_for
from flagdit.codecs.text import text_spec
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.mixture import Mixture, mixture_of
from flagdit.errors import DataError, FlagDiTError, RecipeError
from flagdit.model.tokens import TokenSpec, num_tokens


def check_shares(recipe: Recipe, data_size: int) -> None:
    """Whether every rank and micro-batch gets as many samples, or budgeted packs.

    Raises:
        RecipeError: not so; names the nearest batch sizes and the accumulations that fit.
    """
    size, parts = recipe.data.batch_size, recipe.train.accumulation * data_size
    if size % parts == 0:
        return
    sizes = [n for n in (size // parts * parts, (size // parts + 1) * parts) if n]
    fitting = [a for a in range(1, size + 1) if size % (a * data_size) == 0]
    fitting = sorted(sorted(fitting, key=lambda a: abs(a - recipe.train.accumulation))[:2])
    raise RecipeError(
        f"data.batch_size={size} cannot be shared out evenly over {data_size} data ranks with "
        f"train.accumulation={recipe.train.accumulation}",
        fix=f"Try data.batch_size={' or '.join(map(str, sizes))}"
        + (f", or train.accumulation={' or '.join(map(str, fitting))}." if fitting else "."),
    )


def check_training(recipe: Recipe, mixture: Mixture) -> None:
    """Holds the data sets, and the validation data if the run validates, against the recipe that will train on them.

    Raises:
        DataError: one or more faults of a data set, all listed.
    """
    for member in mixture.members:
        check_dataset(recipe, member.dataset, [m.dataset for m in mixture.members])
    _ = mixture.null_text  # members that were encoded by different text encoders say so here


def check_dataset(recipe: Recipe, dataset: Dataset, all_sets: Sequence[Dataset] = ()) -> None:
    """Holds one data set to train on against the recipe.

    Args:
        all_sets: the data sets of the run, where there are several: one of them must have the validation split.

    Raises:
        DataError: one or more faults, all listed.
    """
    faults = _faults(recipe, dataset)
    alone = len(all_sets) < 2 and not recipe.data.pack_tokens
    _check_split(dataset, "data.split", recipe.data.split, recipe.data.batch_size if alone else 1, faults)
    if recipe.validation.every:
        if recipe.validation.path is None:
            _check_somewhere(recipe, dataset, all_sets, faults)
        else:
            try:
                check_validation(recipe, mixture_of(recipe, {recipe.validation.path: 1.0}))
            except DataError as error:
                faults.append(f"validation.path: {error}")
    _raise(dataset, faults)


def check_validation(recipe: Recipe, mixture: Mixture) -> None:
    """Holds the validation data against the recipe.

    Raises:
        DataError: one or more faults of a data set, all listed.
    """
    for member in mixture.members:
        faults = _faults(recipe, member.dataset)
        _check_somewhere(recipe, member.dataset, [m.dataset for m in mixture.members], faults)
        _raise(member.dataset, faults)


def _check_somewhere(recipe: Recipe, dataset: Dataset, all_sets: Sequence[Dataset], faults: list[str]) -> None:
    if not any(recipe.validation.split in other.splits for other in all_sets):
        _check_split(dataset, "validation.split", recipe.validation.split, 1, faults)


def _raise(dataset: Dataset, faults: list[str]) -> None:
    if faults:
        several = "".join(f"\n  {i}. {fault}" for i, fault in enumerate(faults, start=1))
        raise DataError(
            f"does not suit the recipe:{f' {faults[0]}' if len(faults) == 1 else several}",
            where=str(dataset.path),
            fix="Change the recipe, or encode the data set again with it (`flagdit data encode`).",
        )


def _faults(recipe: Recipe, dataset: Dataset) -> list[str]:
    faults: list[str] = []
    _check_model(recipe, dataset, faults)
    _compare("codec", dataset.codec, lambda: codec_spec_for(recipe, dataset.modality), faults)
    text_dim = recipe.model.text_dim
    if text_dim and dataset.text is None:
        faults.append(f"it has no text features, and model.text_dim={text_dim}")
    elif text_dim and dataset.text is not None:
        if dataset.text["dim"] != text_dim:
            faults.append(f"its text features are {dataset.text['dim']} wide, and model.text_dim={text_dim}")
        _compare("text", dataset.text, lambda: text_spec(recipe.text), faults)
    return faults


def _check_model(recipe: Recipe, dataset: Dataset, faults: list[str]) -> None:
    model, channels = recipe.model, dataset.info["channels"]
    if dataset.modality not in model.modalities:
        faults.append(f"it holds {dataset.modality}, and model.modalities has {', '.join(model.modalities)}")
    elif model.modalities[dataset.modality] != channels:
        wanted = model.modalities[dataset.modality]
        faults.append(f"its latents have {channels} channels, and model.modalities.{dataset.modality}={wanted}")
    bad = []
    for shape, count in dataset.shapes:
        try:
            num_tokens(shape, dataset.modality, TokenSpec.from_model(model))
        except DataError:
            bad.append(f"{shape[3]}×{shape[2]} ({count} samples)")
    if bad:
        pixels = dataset.info["factor"] * model.patch_size
        faults.append(
            f"{len(bad)} of its latent sizes cannot be cut into patches of model.patch_size={model.patch_size}: "
            f"{', '.join(bad[:3])}; build it with --multiple {pixels}"
        )
    if model.num_classes:
        labels = dataset.info["labels"]
        if labels["samples"] < len(dataset):
            faults.append(
                f"{len(dataset) - labels['samples']} samples have no label, and model.num_classes={model.num_classes}"
            )
        if labels["max"] >= model.num_classes:
            faults.append(f"its labels go up to {labels['max']}, and model.num_classes={model.num_classes}")


def _compare(part: str, have: dict[str, Any] | None, want: Callable[[], dict[str, Any]], faults: list[str]) -> None:
    """Names each setting of the codec or text encoder in which data set and recipe differ."""
    try:
        wanted = want()
    except FlagDiTError as error:
        faults.append(str(error))
        return
    have = have or {}
    for name in sorted(have.keys() | wanted.keys()):
        if have.get(name) != wanted.get(name):
            is_model = name == "model"
            key = f"the {part} model (by its files)" if is_model else f"{part}.{name}"
            faults.append(f"it was encoded with {key} {have.get(name)!r}, and the recipe has {wanted.get(name)!r}")


def _check_split(dataset: Dataset, key: str, name: str, at_least: int, faults: list[str]) -> None:
    if name not in dataset.splits:
        faults.append(f"{key}={name} is not one of its splits: {', '.join(dataset.splits)}")
    elif len(dataset.splits[name]) < at_least:
        count = len(dataset.splits[name])
        faults.append(f"data.batch_size={at_least} is larger than its split {name}; try {count} or fewer")
