"""How well a model draws what it is asked for, on a data set whose pictures are known.

Shape legend: B pictures, Z pixels of one picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flagdit.data_pipelines.index import Dataset
from flagdit.generate.images import grid, to_image
from flagdit.generate.pipeline import Pipeline, Progress, load_pipeline
from flagdit.generate.sample import steps_shown


@dataclass(frozen=True)
class Retrieval:
    """What was generated and found.

    Attributes:
        top1: split → share of generated pictures whose nearest neighbour is the picture that the caption belongs to.
        count: split → number of captions.
        generated, references: pixels (3, F, H, W), by split, in the order of the data set.
    """

    top1: dict[str, float]
    count: dict[str, int]
    generated: dict[str, list[Tensor]]
    references: dict[str, list[Tensor]]


def nearest(generated: Sequence[Tensor], references: Sequence[Tensor]) -> list[int]:
    """For each picture the index of the reference with the least L2 distance in pixels, among those of its size.

    A picture without a reference of its size gets −1.
    """
    found = []
    for picture in generated:
        candidates = [i for i, r in enumerate(references) if r.shape == picture.shape]
        if not candidates:
            found.append(-1)
            continue
        known_BZ = torch.stack([references[i].flatten() for i in candidates])
        found.append(candidates[int((known_BZ - picture.flatten()).square().sum(1).argmin())])
    return found


def evaluate_retrieval(pipeline: Pipeline, dataset: Dataset, *, on_step: Progress | None = None) -> Retrieval:
    """Draws a picture for every caption of a data set at its reference's size, and looks for it among all its pictures.

    The references of all splits compete, whichever split the caption is of. Sampling follows the recipe's `sample`.

    Args:
        dataset: encoded with the pipeline's codec.
        on_step: as in `Pipeline.generate`.
    """
    ids = {name: list(split) for name, split in dataset.splits.items()}
    samples = {i: dataset.read(i) for split in ids.values() for i in split}
    pictures = {i: pipeline.codec.decode(s.latent_CFHW).clamp(-1, 1) for i, s in samples.items()}
    order = list(pictures)
    drawn = pipeline.generate(
        [samples[i].caption if pipeline.text_encoder else samples[i].label for i in order],
        pipeline.recipe.sample,
        sizes=[(pictures[i].shape[3], pictures[i].shape[2]) for i in order],
        on_step=on_step,
    )
    found = nearest(drawn, [pictures[i] for i in order])
    right = {i: order[j] == i for i, j in zip(order, found, strict=True) if j >= 0}
    generated = dict(zip(order, drawn, strict=True))
    return Retrieval(
        top1={name: sum(right.get(i, False) for i in split) / len(split) for name, split in ids.items() if split},
        count={name: len(split) for name, split in ids.items()},
        generated={name: [generated[i] for i in split] for name, split in ids.items()},
        references={name: [pictures[i] for i in split] for name, split in ids.items()},
    )


def evaluate_run(run_dir: Path) -> dict[str, float]:
    """Retrieval of a run on the data set that it was trained on.

    Writes the figures into the run folder's figures.json, and for each split a sheet of generated pictures, each above
    the one that its caption belongs to.

    Returns:
        retrieval_top1 and prompts of the training split; heldout_top1 and heldout_prompts, where there is one.

    Raises:
        CheckpointError, RecipeError: the run cannot be sampled.
        DataError: its data set cannot be read.
    """
    pipeline = load_pipeline(run_dir)
    data = pipeline.recipe.data
    dataset = Dataset.open(data.path)
    with steps_shown("evaluating", len(dataset), pipeline.recipe.sample.steps) as on_step:
        found = evaluate_retrieval(pipeline, dataset, on_step=on_step)
    for split, generated in found.generated.items():
        pairs = zip(generated, found.references[split], strict=True)
        cells = [grid([to_image(drawn), to_image(real)], columns=1, gap=0) for drawn, real in pairs]
        if cells:
            grid(cells, columns=20, zoom=2, gap=4).save(run_dir / f"retrieval_{split}.png")
    figures: dict[str, float] = {}
    for split, share in found.top1.items():
        name, count = ("retrieval_top1", "prompts") if split == data.split else (f"{split}_top1", f"{split}_prompts")
        figures |= {name: round(share, 4), count: found.count[split]}
    (run_dir / "figures.json").write_text(json.dumps(figures))
    return figures
