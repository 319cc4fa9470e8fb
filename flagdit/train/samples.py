"""Picture grids in training: the same prompts, sizes and noise every time, from averaged weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from flagdit.codecs.text import TextEncoder
from flagdit.generate.images import grid, to_image
from flagdit.generate.pipeline import Pipeline
from flagdit.model.flag_dit import FlagDiT
from flagdit.train.folder import write_atomically, writing
from flagdit.train.run import Run

COLUMNS = 8
GAP = 2
SMALL = 128
"""Pixels of a side below which pictures are enlarged in the grid, so that a person sees something."""


class SampleGrids:
    """Draws `sample.prompts` with the recipe's sampler.

    Raises:
        RecipeError: the codec or the text encoder cannot be loaded, or a size or prompt cannot be sampled.
    """

    def __init__(self, run: Run):
        prompts = run.recipe.sample.prompts
        pipeline = Pipeline.build(cast(FlagDiT, run.engine.whole(run.model)), run.recipe)
        if pipeline.text_encoder:
            # The prompts never change: their features stay, and the encoder, often larger than the model, may go.
            known = dict(zip(prompts, pipeline.text_encoder.encode(prompts), strict=True))
            pipeline = replace(pipeline, text_encoder=cast(TextEncoder, KnownPrompts(known)))
        self._pipeline = pipeline
        self._conditions = [int(p) if run.recipe.model.num_classes else p for p in prompts]

    def draw(self, run: Run) -> Path:
        """Writes `samples/step_XXXXXXXX.png`, and beside it a .json that tells the report what stands where. All ranks
        draw; rank 0 writes.

        Returns:
            The picture.
        """
        name, weights = run.averaged(run.recipe.sample.ema)
        with run.engine.using(weights):
            pixels = self._pipeline.generate(self._conditions, run.recipe.sample)
        if not run.engine.mesh.is_first:
            return run.folder.sample_grid(run.step)
        images = [to_image(picture_CFHW) for picture_CFHW in pixels]
        zoom = max(1, SMALL // images[0].height)
        file = run.folder.sample_grid(run.step)
        staged = file.with_suffix(".tmp")
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            grid(images, columns=COLUMNS, zoom=zoom, gap=GAP).save(staged, "PNG")
        about = {
            "prompts": run.recipe.sample.prompts,
            "weights": name,
            "columns": COLUMNS,
            "gap": GAP,
            "zoom": zoom,
            "tile": [images[0].width, images[0].height],
        }
        write_atomically(file.with_suffix(".json"), json.dumps(about))
        staged.replace(file)
        return file


@dataclass(frozen=True)
class KnownPrompts:
    """Stands in for a text encoder whose prompts are known beforehand."""

    features: dict[str, Tensor]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        return [self.features[prompt] for prompt in prompts]
