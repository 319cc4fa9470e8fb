"""Pictures with a prompt for each region, and panoramas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.errors import RecipeError
from flagdit.generate.canvas import View, draw_canvas, patches_of, ramp, windows
from flagdit.generate.pipeline import Condition, Pipeline

BACKGROUND = 0.05
"""Weight of the prompt for the whole beside that of a region."""


@dataclass(frozen=True)
class Region:
    """A rectangle with a condition of its own.

    Attributes:
        condition: what it shows.
        left, top, width, height: in pixels.
    """

    condition: Condition
    left: int
    top: int
    width: int
    height: int

    @property
    def place(self) -> str:
        """WIDTHxHEIGHT+LEFT+TOP."""
        return f"{self.width}x{self.height}+{self.left}+{self.top}"

    @classmethod
    def parse(cls, text: str) -> Region:
        """'WIDTHxHEIGHT+LEFT+TOP PROMPT' → a region.

        Raises:
            RecipeError: another format.
        """
        found = re.fullmatch(r"\s*(\d+)[x×](\d+)\+(\d+)\+(\d+)[\s:]+(\S.*)", text, re.DOTALL)
        if not found:
            raise RecipeError(
                f"{text!r} is not a region", fix="Write WIDTHxHEIGHT+LEFT+TOP PROMPT, such as '24x24+0+0 a dog'."
            )
        width, height, left, top = map(int, found.groups()[:4])
        return cls(found[5].strip(), left, top, width, height)


def compose(
    pipeline: Pipeline,
    regions: Sequence[Region],
    cfg: SampleConfig,
    *,
    size: tuple[int, int],
    background: Condition | None = None,
    fade: int = 1,
    **options: Any,
) -> Tensor:
    """Draws one picture with a prompt for each region.

    Every region is drawn at its own size, as a picture of its own, and at once as a part of the whole.

    Args:
        pipeline: of the model.
        regions: may overlap.
        cfg: as for `draw_canvas`.
        size: (width, height) of the picture in pixels.
        background: what the whole shows; needed where no region is. In a region it counts little.
        fade: patches within which a region fades towards its edges.
        options: as for `draw_canvas`.

    Raises:
        RecipeError: as `draw_canvas`, or a region whose sides the model cannot make.
    """
    rows, columns = patches_of(pipeline, size[::-1], "a size of {}x{}".format(*size))
    views = []
    for region in regions:
        box = (region.top, region.left, region.height, region.width)
        top, left, height, width = patches_of(pipeline, box, f"a region of {region.place}")
        weight = ramp(height, fade)[:, None] * ramp(width, fade)
        views.append(View(region.condition, (0, top, left), (cfg.frames, height, width), weight))
    if background is not None:
        views.append(View(background, (0, 0, 0), (cfg.frames, rows, columns), torch.tensor(BACKGROUND)))
    return draw_canvas(pipeline, views, cfg, size=size, **options)


def panorama(
    pipeline: Pipeline,
    conditions: Sequence[Condition],
    cfg: SampleConfig,
    *,
    size: tuple[int, int],
    window: tuple[int, int],
    overlap: float = 0.5,
    wrap: bool = False,
    **options: Any,
) -> Tensor:
    """Draws a picture larger than the model's through overlapping windows.

    Args:
        pipeline: of the model.
        conditions: from left to right; each window takes the one at its middle.
        cfg: as for `draw_canvas`.
        size: (width, height) of the picture in pixels.
        window: (width, height) of a window, such as the size of training.
        overlap: share of a window that the next one covers too, at least.
        wrap: whether the right edge joins the left one.
        options: as for `draw_canvas`.

    Raises:
        RecipeError: as `draw_canvas`, or a window that the model cannot make.
    """
    rows, columns = patches_of(pipeline, size[::-1], "a size of {}x{}".format(*size))
    height, width = patches_of(pipeline, window[::-1], "a window of {}x{}".format(*window))
    height, width = min(height, rows), min(width, columns)
    weight = ramp(height, height // 2)[:, None] * ramp(width, width // 2)
    views = []
    for top in windows(rows, height, overlap, wrap=False):
        for left in windows(columns, width, overlap, wrap):
            middle = (left + width / 2) % columns / columns
            condition = conditions[min(int(middle * len(conditions)), len(conditions) - 1)]
            views.append(View(condition, (0, top, left), (cfg.frames, height, width), weight))
    return draw_canvas(pipeline, views, cfg, size=size, wrap=(False, False, wrap), **options)
