"""One call for every way to draw: side by side, as a set, in stages, by regions, through windows, as scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.config.validate import parse_size
from flagdit.errors import RecipeError
from flagdit.generate.compose import Region, compose, panorama
from flagdit.generate.images import load_image
from flagdit.generate.inference import shared
from flagdit.generate.pipeline import Condition, Pipeline, Progress
from flagdit.generate.resolution import resize, upscale
from flagdit.generate.transition import scenes


@dataclass(frozen=True)
class Way:
    """How samples are drawn. The default draws every condition by itself; at most one of the first five is given.

    Attributes:
        upscale: in stages from the trained size; the share of the way that each later stage draws anew.
        share: all conditions as one set, whose tokens see each other's until this time.
        regions: with a prompt each; the condition, if there is one, is the background.
        window: (width, height) of overlapping windows that draw one large picture, the conditions from left to right.
        scenes: one video whose scenes are the conditions.
        wrap: with `window`, the right edge joins the left one.
        loop, window_frames, first_frame: of `scenes`; see `transition.scenes`.
    """

    upscale: float | None = None
    share: float | None = None
    regions: Sequence[Region] = ()
    window: tuple[int, int] | None = None
    scenes: bool = False
    wrap: bool = False
    loop: bool = False
    window_frames: int | None = None
    first_frame: Tensor | None = None

    @classmethod
    def of(cls, *, regions: Sequence[str], window: str | None, first_frame: Path | None, **plain: Any) -> Way:
        """A way as a person gives it: regions and sizes as text, pictures as files.

        Raises:
            RecipeError: text of another format, no such picture, or what `check` raises.
        """
        way = cls(
            regions=tuple(Region.parse(text) for text in regions),
            window=None if window is None else parse_size(window),
            first_frame=None if first_frame is None else load_image(first_frame),
            **plain,
        )
        way.check()
        return way

    @property
    def one_picture(self) -> bool:
        """Whether all conditions make one sample together."""
        return bool(self.regions) or self.window is not None or self.scenes

    def check(self) -> None:
        """Whether this can be done.

        Raises:
            RecipeError: ways that exclude each other, or settings of a way that is not taken.
        """
        given = {
            "--upscale": self.upscale is not None,
            "--share": self.share is not None,
            "--region": bool(self.regions),
            "--window": self.window is not None,
            "--scenes": self.scenes,
        }
        taken = [name for name, is_given in given.items() if is_given]
        if len(taken) > 1:
            raise RecipeError(f"{' and '.join(taken)} exclude each other", fix="Give one of them.")
        if self.wrap and self.window is None:
            raise RecipeError("--wrap has no effect without --window")
        if not self.scenes and (self.loop or self.window_frames or self.first_frame is not None):
            raise RecipeError("--loop, --window-frames and --first-frame have no effect without --scenes")


def draw(
    pipeline: Pipeline,
    conditions: Sequence[Condition],
    cfg: SampleConfig,
    way: Way,
    *,
    sizes: Sequence[tuple[int, int]],
    first_id: int = 0,
    on_step: Progress | None = None,
) -> list[Tensor]:
    """Draws conditions in a way.

    Args:
        pipeline: of the model.
        conditions: prompts or class ids.
        cfg: the recipe's `sample` block.
        way: how.
        sizes: (width, height) of each condition; ways that make one picture of all take the first.
        first_id: id of the first sample, which decides its noise.
        on_step: as for `Pipeline.generate`.

    Returns:
        Pixels (3, F, H, W) in [−1, 1]: one per condition, or one for all.

    Raises:
        RecipeError: what cannot be drawn so.
    """
    way.check()
    if cfg.modality == "audio" and (way.one_picture or way.upscale is not None):
        raise RecipeError("regions, windows, scenes and stages are of pictures", fix="Sounds take --seconds.")
    if way.upscale is not None:
        return upscale(pipeline, conditions, cfg, sizes=sizes, strength=way.upscale, first_id=first_id, on_step=on_step)
    if way.one_picture:
        whole = partial(_one_picture, pipeline, cfg, way, sizes[0])
        return [whole(conditions, sample_id=first_id, on_step=on_step)]
    inference = None
    if way.share is not None:
        inference = shared(pipeline.inference(cfg), len(conditions), way.share)
    return pipeline.generate(conditions, cfg, sizes=sizes, first_id=first_id, inference=inference, on_step=on_step)


def _one_picture(
    pipeline: Pipeline,
    cfg: SampleConfig,
    way: Way,
    size: tuple[int, int],
    conditions: Sequence[Condition],
    *,
    sample_id: int,
    on_step: Progress | None,
) -> Tensor:
    if way.regions:
        if len(conditions) > 1:
            raise RecipeError(f"{len(conditions)} prompts beside regions", fix="Give one, for the background, or none.")
        background = conditions[0] if conditions else None
        return compose(
            pipeline, way.regions, cfg, size=size, background=background, sample_id=sample_id, on_step=on_step
        )
    if way.window is not None:
        return panorama(
            pipeline,
            conditions,
            cfg,
            size=size,
            window=way.window,
            wrap=way.wrap,
            sample_id=sample_id,
            on_step=on_step,
        )
    return scenes(
        pipeline,
        conditions,
        cfg,
        size=size,
        window=way.window_frames,
        loop=way.loop,
        first_frame=None if way.first_frame is None else resize(way.first_frame, size),
        sample_id=sample_id,
        on_step=on_step,
    )
