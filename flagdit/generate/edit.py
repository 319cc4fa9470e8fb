"""Editing pictures: drawn anew in part (by strength), in place (by mask), or in another picture's style.

Shape legend: C, F, H, W  channels, frames or views, rows, columns of pixels or latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.config.validate import parse_size
from flagdit.errors import RecipeError
from flagdit.generate.images import check_name, load_image, load_mask
from flagdit.generate.media import save_samples
from flagdit.generate.pipeline import Condition, Pipeline, Progress, load_pipeline
from flagdit.generate.sample import settings_of, steps_shown
from flagdit.generate.solve import Start


def edit(
    pipeline: Pipeline,
    pictures: Sequence[Tensor],
    conditions: Sequence[Condition],
    cfg: SampleConfig,
    *,
    strength: float = 0.6,
    masks: Sequence[Tensor] | None = None,
    style: Tensor | None = None,
    first_id: int = 0,
    on_step: Progress | None = None,
) -> list[Tensor]:
    """Draws pictures, videos or views anew, starting from what they are.

    Args:
        pipeline: of the model.
        pictures: pixels (3, F, H, W) in [−1, 1], each of a size that the model can make.
        conditions: what each shall become.
        cfg: solver, guidance and seed; a later start skips the steps before it.
        strength: share of the way from noise that is drawn anew, above 0: small ones keep the layout, 1 keeps nothing
            (arXiv 2108.01073).
        masks: (F or 1, H, W) bool per picture, True where to draw; elsewhere the pixels stay exactly as they are. None:
            everywhere.
        style: pixels of a picture whose latent statistics the result starts from; see `match_statistics`.
        first_id, on_step: as for `Pipeline.generate`.

    Returns:
        Pixels (3, F, H, W), fp32 on the CPU, one per picture.

    Raises:
        RecipeError: a strength, mask or size that cannot be met, or what `Pipeline.generate` raises.
    """
    frames = {p.shape[1] for p in pictures}
    if len(frames) > 1:
        raise RecipeError("pictures of different numbers of frames are edited one by one")
    for picture, mask in zip(pictures, masks or (), strict=bool(masks)):
        if mask.shape[1:] != picture.shape[2:] or mask.shape[0] not in (1, picture.shape[1]):
            raise RecipeError(
                f"a mask of {mask.shape[2]}x{mask.shape[1]} does not fit a picture of "
                f"{picture.shape[3]}x{picture.shape[2]} pixels"
            )
    sizes = [(p.shape[3], p.shape[2]) for p in pictures]
    for size, picture in zip(sizes, pictures, strict=True):
        pipeline.latent_shape(
            size, picture.shape[1], cfg.modality
        )  # a size that cannot be made is told before encoding
    latents = [pipeline.codec.encode(p) for p in pictures]
    if style is not None:
        style_latent = pipeline.codec.encode(style)
        latents = [match_statistics(latent, style_latent) for latent in latents]
    keep = None if masks is None else [~latent_mask(m, pipeline.codec.factor) for m in masks]
    drawn = pipeline.generate(
        conditions,
        cfg,
        sizes=sizes,
        start=Start(latents, strength, keep),
        first_id=first_id,
        on_step=on_step,
    )
    if masks is None:
        return drawn
    # A latent covers several pixels, and an autoencoder loses a little: what is not masked comes from the picture.
    return [torch.where(m[None], new, old) for m, new, old in zip(masks, drawn, pictures, strict=True)]


def edit_file(
    run_dir: Path,
    picture: Path,
    prompt: str,
    out: Path,
    *,
    strength: float = 0.6,
    mask: Path | None = None,
    style: Path | None = None,
    size: str | None = None,
    repeat: int = 1,
    step: int | None = None,
    ema: int | None = None,
    separate: bool = False,
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Path]:
    """`flagdit edit`: a picture file anew.

    Args:
        run_dir: the run folder.
        picture: the file. Without `size` it is cut to sides that the model can make.
        prompt: what it shall become.
        out: picture file to write.
        strength: see `edit`.
        mask: a picture, white where to draw.
        style: a picture whose statistics to take.
        size: "WIDTHxHEIGHT" to scale the picture to first.
        repeat: versions, from different noise.
        step, ema, separate, preset_name, settings: as for `sample.sample_to_files`.

    Returns:
        The files.

    Raises:
        RecipeError: files, sizes or settings that cannot be met.
        CheckpointError: the run cannot be read.
    """
    check_name(out)
    pipeline = load_pipeline(run_dir, step=step, ema=ema)
    cfg = settings_of(pipeline.recipe, preset_name, settings)
    if cfg.modality == "audio":
        raise RecipeError("sounds cannot be edited", where="sample.modality", fix="Edit with a model of pictures.")
    unit = pipeline.codec.factor * pipeline.spec.patch_size
    pixels = load_image(picture, parse_size(size) if size else None, unit)
    where = None if mask is None else [load_mask(mask, (pixels.shape[3], pixels.shape[2]))] * repeat
    styled = None if style is None else load_image(style, multiple=pipeline.codec.factor)
    with steps_shown("editing", repeat, max(round(cfg.steps * strength), 1)) as on_step:
        drawn = edit(
            pipeline,
            [pixels] * repeat,
            [prompt] * repeat,
            cfg,
            strength=strength,
            masks=where,
            style=styled,
            on_step=on_step,
        )
    return save_samples(drawn, "image", out, rate=pipeline.recipe.audio.sample_rate, separate=separate)


def latent_mask(mask_FHW: Tensor, factor: int) -> Tensor:
    """Pixels to draw → latents to draw, (1, F, H/factor, W/factor): those with any pixel to draw."""
    return F.max_pool2d(mask_FHW.float()[:, None], factor)[:, 0].bool()[None]


def match_statistics(latent_CFHW: Tensor, style_CFHW: Tensor) -> Tensor:
    """The latent with the mean and standard deviation of every channel taken from another (arXiv 1703.06868).

    Channel statistics carry palette, brightness and contrast, and the rest the layout; so this moves a picture towards
    another's style without training, and sampling from it draws the details anew.
    """
    axes = (1, 2, 3)
    std, mean = torch.std_mean(latent_CFHW, axes, correction=0, keepdim=True)
    style_std, style_mean = torch.std_mean(style_CFHW, axes, correction=0, keepdim=True)
    return (latent_CFHW - mean) / std.clamp(min=1e-6) * style_std + style_mean
