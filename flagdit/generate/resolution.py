"""Sizes beyond those of training: how positions and attention are read there, and upscaling in stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.config.validate import parse_size
from flagdit.errors import RecipeError
from flagdit.generate.pipeline import Condition, Pipeline, Progress
from flagdit.generate.solve import Start

LEAST_GROWTH = 1.2
"""A stage that grows a side by less is left out: it would only cost time."""


def stages(first: tuple[int, int], last: tuple[int, int], unit: int, growth: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (width, height) from one about as large as `first` to `last`, all of the aspect ratio of `last`.

    Args:
        first: a size that the model was trained on; the first stage has about its area.
        last: the size that is wanted, in multiples of `unit`.
        unit: sides of all stages are multiples of it, in pixels.
        growth: largest factor between sides of neighbouring stages.
    """
    width, height = last
    ratio = ((width * height) / (first[0] * first[1])) ** 0.5
    if ratio < LEAST_GROWTH:
        return [last]
    count = 1
    while growth**count < ratio * 0.999:
        count += 1
    found = [tuple(max(round(side / ratio ** (1 - i / count) / unit), 1) * unit for side in last) for i in range(count)]
    return [*((w, h) for w, h in found), last]


def upscale(
    pipeline: Pipeline,
    conditions: Sequence[Condition],
    cfg: SampleConfig,
    *,
    sizes: Sequence[tuple[int, int]],
    strength: float = 0.6,
    first_id: int = 0,
    on_step: Progress | None = None,
) -> list[Tensor]:
    """Draws small, then in stages enlarges, re-noises in part and refines.

    Large pictures so keep the layout that the model knows from training. Enlarging goes through pixels: latents of
    block codecs and of many autoencoders cannot be interpolated.

    Args:
        pipeline: of the model.
        conditions: prompts or class ids.
        cfg: `train_size` is the size of the first stage; the rest as for `Pipeline.generate`.
        sizes: (width, height) wanted for each condition.
        strength: share of the way from noise that every later stage draws anew.
        first_id, on_step: as for `Pipeline.generate`.

    Returns:
        Pixels (3, F, H, W) in [−1, 1], one per condition.

    Raises:
        RecipeError: no train_size, or what `Pipeline.generate` raises.
    """
    if cfg.train_size is None:
        raise RecipeError("upscaling starts from a trained size, and none is given", fix="Give --train-size.")
    unit = pipeline.codec.factor * pipeline.model.cfg.patch_size
    plans = [stages(parse_size(cfg.train_size), size, unit) for size in sizes]
    pictures: list[Tensor] = []
    for i, (condition, plan) in enumerate(zip(conditions, plans, strict=True)):
        picture: Tensor | None = None
        for size in plan:
            start = None
            if picture is not None:
                start = Start([pipeline.codec.encode(resize(picture, size))], strength)
            (picture,) = pipeline.generate(
                [condition], cfg, sizes=[size], first_id=first_id + i, start=start, on_step=on_step
            )
        assert picture is not None
        pictures.append(picture)
    return pictures


def resize(pixels_CFHW: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, F, H, W) at another (width, height), bicubic and antialiased, within [−1, 1]."""
    frames = F.interpolate(pixels_CFHW.transpose(0, 1), (size[1], size[0]), mode="bicubic", antialias=True)
    return frames.transpose(0, 1).clamp(-1, 1).contiguous()
