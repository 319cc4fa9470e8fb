"""How well a model draws what it is asked for, on a data set whose pictures are known.

Shape legend: B pictures of one size, Z values of one picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flagdit.data_pipelines.index import Dataset, Encoded
from flagdit.errors import CheckpointError, DataError, RecipeError
from flagdit.generate.images import grid, save_image, to_image
from flagdit.generate.pipeline import Condition, Pipeline, Progress, load_pipeline
from flagdit.generate.sample import steps_shown

SHEET_COLUMNS, MOST_ON_SHEET = 20, 200


@dataclass(frozen=True)
class Retrieval:
    """What was generated and found, by split, in the order of the data set.

    Attributes:
        top1: share of generated pictures whose nearest neighbour has the caption (or class) that was asked for.
        generated, references: pixels (3, F, H, W).
    """

    top1: dict[str, float]
    generated: dict[str, list[Tensor]]
    references: dict[str, list[Tensor]]


def nearest(generated: Sequence[Tensor], references: Sequence[Tensor]) -> list[int]:
    """For each picture the index of the reference with the least L2 distance in pixels, among those of its size.

    A picture without a reference of its size gets −1.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for i, reference in enumerate(references):
        by_shape.setdefault(reference.shape, []).append(i)
    known_BZ = {shape: torch.stack([references[i].flatten() for i in ids]) for shape, ids in by_shape.items()}
    found = []
    for picture in generated:
        ids = by_shape.get(picture.shape)
        if ids is None:
            found.append(-1)
        else:
            distance_B = (known_BZ[picture.shape] - picture.flatten()).square().sum(1)
            found.append(ids[int(distance_B.argmin())])
    return found


def evaluate_retrieval(
    pipeline: Pipeline, dataset: Dataset, *, most: int | None = None, on_step: Progress | None = None
) -> Retrieval:
    """Draws a picture for every caption of a data set at its reference's size, and looks for it among all its pictures.

    The references of all splits compete, whichever split the caption is of. Sampling follows the recipe's `sample`.

    Args:
        dataset: encoded with the pipeline's codec.
        most: captions of each split to draw, spread evenly over it; None: all.
        on_step: as in `Pipeline.generate`.

    Raises:
        DataError: the data set was encoded otherwise, or a sample cannot be read.
        RecipeError: the model follows no condition.
    """
    if pipeline.text_encoder is None and not pipeline.model.cfg.num_classes:
        raise RecipeError("this model follows neither captions nor classes, so there is nothing to look for")
    if dataset.codec != pipeline.codec.spec():
        raise DataError(
            f"was encoded with {dataset.codec}, and the run has {pipeline.codec.spec()}",
            where=str(dataset.path),
            fix="Give the data set that the run was trained on (--data).",
        )
    samples = [dataset.read(i) for i in range(len(dataset))]
    pictures = [pipeline.codec.decode(s.latent_CFHW).clamp(-1, 1) for s in samples]
    chosen = {name: _spread(ids, most) for name, ids in dataset.splits.items() if len(ids)}
    order = [i for ids in chosen.values() for i in ids]
    drawn = pipeline.generate(
        [_condition(samples[i], pipeline) for i in order],
        pipeline.recipe.sample,
        sizes=[(pictures[i].shape[3], pictures[i].shape[2]) for i in order],
        on_step=on_step,
    )
    generated = dict(zip(order, drawn, strict=True))
    # Where captions repeat, and with classes, any picture of the same caption or class is the right one.
    found = dict(zip(order, nearest(drawn, pictures), strict=True))
    right = {i: _condition(samples[i], pipeline) == _condition(samples[found[i]], pipeline) for i in order}
    return Retrieval(
        top1={name: sum(right[i] for i in ids) / len(ids) for name, ids in chosen.items()},
        generated={name: [generated[i] for i in ids] for name, ids in chosen.items()},
        references={name: [pictures[i] for i in ids] for name, ids in chosen.items()},
    )


def evaluate_run(run_dir: Path, *, data: str | None = None, most: int | None = None) -> dict[str, float]:
    """Retrieval of a run on the data set that it was trained on.

    Writes the figures into the run folder's figures.json, and for each split a sheet of generated pictures, each above
    the one that its caption belongs to.

    Args:
        run_dir: the run folder.
        data: folder of the data set; None: the recipe's data.path.
        most: captions of each split to draw; None: all.

    Returns:
        retrieval_top1 and prompts of the training split; heldout_top1 and heldout_prompts, where there is one.

    Raises:
        CheckpointError, RecipeError: the run cannot be sampled, or its folder not written.
        DataError: its data set cannot be read.
    """
    pipeline = load_pipeline(run_dir)
    dataset = Dataset.open(data or pipeline.recipe.data.path)
    count = sum(len(_spread(ids, most)) for ids in dataset.splits.values())
    with steps_shown("evaluating", count, pipeline.recipe.sample.steps) as on_step:
        found = evaluate_retrieval(pipeline, dataset, most=most, on_step=on_step)
    figures: dict[str, float] = {}
    for split, share in found.top1.items():
        is_train = split == pipeline.recipe.data.split
        name, prompts = ("retrieval_top1", "prompts") if is_train else (f"{split}_top1", f"{split}_prompts")
        figures |= {name: round(share, 4), prompts: len(found.generated[split])}
        save_image(_sheet(found.generated[split], found.references[split]), run_dir / f"retrieval_{split}.png")
    try:
        (run_dir / "figures.json").write_text(json.dumps(figures) + "\n")
    except OSError as error:
        raise CheckpointError(f"figures.json cannot be written: {error.strerror}", where=str(run_dir)) from error
    return figures


def _condition(sample: Encoded, pipeline: Pipeline) -> Condition:
    return sample.caption if pipeline.text_encoder else sample.label


def _spread(ids: range, most: int | None) -> list[int]:
    count = len(ids) if most is None else min(most, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


def _sheet(generated: Sequence[Tensor], references: Sequence[Tensor]) -> Image.Image:
    """Each generated picture above its reference."""
    pairs = list(zip(generated, references, strict=True))[:MOST_ON_SHEET]
    cells = [grid([to_image(drawn), to_image(real)], columns=1, gap=0) for drawn, real in pairs]
    return grid(cells, columns=SHEET_COLUMNS, zoom=max(1, 48 // max(cell.width for cell in cells)), gap=4)
