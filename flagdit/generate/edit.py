"""Editing pictures: drawn anew in part (by strength), in place (by mask), or in another picture's style.

Shape legend: C, F, H, W  channels, frames or views, rows, columns of pixels or latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.errors import RecipeError
from flagdit.generate.pipeline import Condition, Pipeline, Progress
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
