"""One canvas that several views draw together: any size, any prompt anywhere.

A view is a window of the canvas, in space and in time, with a condition of its own, at a size that the model knows. In
every evaluation each view gives the velocity of its window, and the canvas takes their weighted mean
(MultiDiffusion, arXiv 2302.08113). Regions, panoramas, scenes of a video and loops are all lists of views.

Shape legend
    F, H, W  frames, rows and columns of patches
    M        patch tokens of all views of a pack
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flagdit.batch import Segment
from flagdit.config.schema import SampleConfig
from flagdit.errors import RecipeError
from flagdit.flow.compose import Views, blend
from flagdit.generate.inference import InferenceAt
from flagdit.generate.pipeline import Condition, Pipeline, Progress, split
from flagdit.generate.solve import Start
from flagdit.model.flag_dit import Inference
from flagdit.model.tokens import Shape, grid, num_tokens

Three = tuple[int, int, int]


@dataclass(frozen=True)
class View:
    """A window of a canvas.

    Attributes:
        condition: what it shows.
        start: its first (frame, row, column), in patches.
        size: its frames, rows and columns, in patches. A window may run over the end of the canvas where that wraps.
        weight_FHW: how much it counts at each of its patches, from 0; expands to `size`.
    """

    condition: Condition
    start: Three
    size: Three
    weight_FHW: Tensor

    def tokens(self, canvas: Three, wrap: Sequence[bool]) -> Tensor:
        """(F·H·W,) the canvas' patch under each patch of the window, in raster order.

        Raises:
            RecipeError: the window leaves the canvas along an axis that does not wrap.
        """
        axes = []
        for name, first, count, length, wraps in zip(
            ("frames", "rows", "columns"), self.start, self.size, canvas, wrap, strict=True
        ):
            if count > length or not (wraps or 0 <= first <= length - count):
                raise RecipeError(
                    f"a window of {name} {first} to {first + count - 1} leaves a canvas of {length} (in patches)"
                )
            axes.append((first + torch.arange(count)) % length)
        f, h, w = axes
        return ((f[:, None, None] * canvas[1] + h[:, None]) * canvas[2] + w).flatten()


def ramp(length: int, fade: int) -> Tensor:
    """(length,) weights that rise from each end to 1 within `fade` patches and are nowhere 0."""
    at = torch.arange(length)
    return (torch.minimum(at, length - 1 - at) + 1).div(fade + 1).clamp(max=1)


def windows(length: int, window: int, overlap: float, wrap: bool) -> list[int]:
    """First patches of windows that cover a length, evenly spaced, with at least the given share of overlap.

    Raises:
        RecipeError: an overlap outside 0 to below 1.
    """
    if not 0 <= overlap < 1:
        raise RecipeError(f"an overlap of {overlap:g} must be a share from 0 to below 1")
    if window >= length:
        return [0]
    stride = max(1, math.floor(window * (1 - overlap)))
    if wrap:
        count = math.ceil(length / stride)
        return [i * length // count for i in range(count)]
    count = math.ceil((length - window) / stride) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def draw_canvas(
    pipeline: Pipeline,
    views: Sequence[View],
    cfg: SampleConfig,
    *,
    size: tuple[int, int],
    wrap: Sequence[bool] = (False, False, False),
    sample_id: int = 0,
    inference: Inference | InferenceAt | None = None,
    start: Start | None = None,
    pack_tokens: int = 16384,
    on_step: Progress | None = None,
) -> Tensor:
    """Draws one canvas.

    Args:
        pipeline: of the model.
        views: cover the canvas.
        cfg: frames, solver, guidance and seed.
        size: (width, height) of the canvas in pixels.
        wrap: along frames, rows and columns: whether the end joins the beginning.
        sample_id: decides the noise, which belongs to the canvas.
        inference, pack_tokens, on_step: as for `Pipeline.generate`; tokens of views count.
        start: of the canvas; None: noise.

    Returns:
        Pixels (3, F, H, W) in [−1, 1].

    Raises:
        RecipeError: what the model cannot make, a window outside the canvas, or a part of it under no view.
    """
    shape = pipeline.latent_shape(size, cfg.frames, cfg.modality)
    canvas = grid(shape, cfg.modality, pipeline.spec.patch_size)
    _check_cover(views, canvas, wrap)
    inference = pipeline.inference(cfg) if inference is None else inference
    segments = [Segment(sample_id, cfg.modality, _latent_shape(shape, v.size, pipeline)) for v in views]
    conditions = [v.condition for v in views]
    features, labels = pipeline.features(conditions), pipeline.labels(conditions)
    halves = 1 if cfg.guidance == 1 else 2
    costs = [halves * num_tokens(s.shape, s.modality, pipeline.spec) for s in segments]
    parts = []
    for part in split(costs, pack_tokens):
        batch = pipeline.batch(segments[part], features and features[part], labels and labels[part])
        device = batch.layout.cu_seqlens.device
        weight_M = torch.cat([v.weight_FHW.expand(v.size).flatten() for v in views[part]])
        parts.append(
            Views(
                pipeline.velocity(batch, cfg, inference),
                {cfg.modality: torch.cat([v.tokens(canvas, wrap) for v in views[part]]).to(device)},
                {cfg.modality: weight_M[:, None].to(device)},
            )
        )
    whole = pipeline.batch([Segment(sample_id, cfg.modality, shape)], None, None)
    tell = None if on_step is None else partial(on_step, finished=0)
    (latent,) = pipeline.solve(blend(parts), whole, cfg, start, tell)
    return pipeline.decode(latent)


def patches_of(pipeline: Pipeline, pixels: Sequence[int], what: str) -> tuple[int, ...]:
    """Pixels → patches, along rows or columns.

    Args:
        what: has these pixels, as the user wrote it.

    Raises:
        RecipeError: not multiples of what a patch covers.
    """
    unit = pipeline.codec.factor * pipeline.spec.patch_size
    if any(p % unit for p in pixels):
        raise RecipeError(f"{what} must be made of multiples of {unit} pixels")
    return tuple(p // unit for p in pixels)


def _latent_shape(canvas: Shape, size: Three, pipeline: Pipeline) -> Shape:
    step = pipeline.spec.patch_size
    return (canvas[0], size[0], size[1] * step, size[2] * step)


def _check_cover(views: Sequence[View], canvas: Three, wrap: Sequence[bool]) -> None:
    covered = torch.zeros(math.prod(canvas))
    for view in views:
        covered.index_add_(0, view.tokens(canvas, wrap), view.weight_FHW.expand(view.size).flatten())
    if not covered.all():
        place = int((covered == 0).nonzero()[0])
        frame, row, column = place // (canvas[1] * canvas[2]), place // canvas[2] % canvas[1], place % canvas[2]
        raise RecipeError(
            f"nothing says what to draw at frame {frame}, row {row}, column {column} (in patches)",
            fix="Give a prompt for the whole, or regions that cover it.",
        )
