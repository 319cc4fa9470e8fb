"""Videos of any length: scenes that flow into each other, loops, and a picture as the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.errors import RecipeError
from flagdit.generate.canvas import View, draw_canvas, patches_of, ramp, windows
from flagdit.generate.pipeline import Condition, Pipeline
from flagdit.generate.solve import Start
from flagdit.model.tokens import modality_of


def scenes(
    pipeline: Pipeline,
    conditions: Sequence[Condition],
    cfg: SampleConfig,
    *,
    size: tuple[int, int],
    window: int | None = None,
    overlap: float = 0.5,
    fade: int | None = None,
    loop: bool = False,
    first_frame: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Draws a video of `cfg.frames` frames in which the conditions follow each other, each for as long.

    Overlapping windows of frames carry motion and look from one to the next. Around the change from one scene to the
    next the windows are drawn for both, and their velocities cross-fade.

    Args:
        pipeline: of the model.
        conditions: the scenes in their order; one: a single scene of any length.
        cfg: modality (one that has frames), frames, solver, guidance and seed.
        size: (width, height) in pixels.
        window: frames that are drawn at once, as the model was trained; None: all, where there is one scene.
        overlap: share of a window that the next one covers too, at least.
        fade: frames that a change takes; None: half a window.
        loop: whether the last frame leads back to the first; windows and scenes then run around.
        first_frame: (3, 1, H, W) pixels that the video starts from.
        options: as for `draw_canvas`.

    Returns:
        Pixels (3, F, H, W) in [−1, 1].

    Raises:
        RecipeError: as `draw_canvas`; a modality without frames; or a first frame of another size.
    """
    if not modality_of(cfg.modality).has_frames:
        raise RecipeError(
            f"{cfg.modality} has no frames", where="sample.modality", fix="Use one that has, such as video."
        )
    rows, columns = patches_of(pipeline, size[::-1], "a size of {}x{}".format(*size))
    window = min(window or cfg.frames, cfg.frames)
    shares = schedule(len(conditions), cfg.frames, window // 2 if fade is None else fade, loop)
    views = []
    for first in windows(cfg.frames, window, overlap, loop):
        inside = (first + torch.arange(window)) % cfg.frames
        for condition, share_F in zip(conditions, shares, strict=True):
            weight_F = share_F[inside] * ramp(window, window // 2)
            if weight_F.any():
                views.append(View(condition, (first, 0, 0), (window, rows, columns), weight_F[:, None, None]))
    start = None if first_frame is None else _from_first_frame(pipeline, first_frame, cfg, size)
    return draw_canvas(pipeline, views, cfg, size=size, wrap=(loop, False, False), start=start, **options)


def schedule(count: int, frames: int, fade: int, loop: bool) -> Tensor:
    """(count, frames) share of every scene in every frame; in each frame they add up to 1.

    A change is centred between two scenes and takes `fade` frames, at most the length of a scene.
    """
    length = frames / count
    half = max(min(fade, length) / 2, 1e-6)
    middle = (torch.arange(count) + 0.5)[:, None] * length
    distance = (torch.arange(frames) + 0.5 - middle).abs()
    if loop:
        distance = torch.minimum(distance, frames - distance)
    elif count > 1:  # nothing comes before the first scene and after the last
        at = torch.arange(frames) + 0.5
        distance[0, at < middle[0]] = 0
        distance[-1, at > middle[-1]] = 0
    share = ((length / 2 + half - distance) / (2 * half)).clamp(0, 1)
    return share / share.sum(0)


def smoothness(pixels_CFHW: Tensor, changes: Sequence[int], width: int = 1) -> float:
    """Largest step between neighbouring frames near the changes, over the mean step elsewhere.

    Args:
        pixels_CFHW: the video.
        changes: first frames of new scenes.
        width: steps on either side of a change that count as near.
    """
    steps = (pixels_CFHW[:, 1:] - pixels_CFHW[:, :-1]).square().mean((0, 2, 3)).sqrt()
    near = torch.zeros(len(steps), dtype=torch.bool)
    for frame in changes:
        near[max(frame - width, 0) : frame + width - 1] = True
    return float(steps[near].max() / steps[~near].mean().clamp(min=1e-12))


def _from_first_frame(pipeline: Pipeline, first_frame: Tensor, cfg: SampleConfig, size: tuple[int, int]) -> Start:
    if tuple(first_frame.shape) != (3, 1, size[1], size[0]):
        raise RecipeError(
            f"the first frame is {first_frame.shape[-1]}x{first_frame.shape[-2]} pixels, the video {size[0]}x{size[1]}"
        )
    latent = pipeline.codec.encode(first_frame.expand(-1, cfg.frames, -1, -1))
    keep = torch.zeros(1, cfg.frames, 1, 1, dtype=torch.bool)
    keep[:, 0] = True
    return Start([latent], keep=[keep])
