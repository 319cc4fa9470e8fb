"""Editing: samples drawn anew in part (by strength), in place (by mask), or in another one's style.

Shape legend
    C, F, H, W  channels, frames or views, rows, columns of pixels or latents
    N           samples of a sound, whose C, F and H are 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.codecs.audio import MelCodec
from flagdit.config.schema import SampleConfig
from flagdit.config.validate import parse_size
from flagdit.errors import RecipeError
from flagdit.generate import inputs
from flagdit.generate.media import DEFAULT_NAMES, check_any_name, check_media_name, save_samples
from flagdit.generate.mesh import check_one_sample
from flagdit.generate.pipeline import Condition, Pipeline, Progress, load_pipeline
from flagdit.generate.sample import settings_of, steps_shown
from flagdit.generate.solve import Start
from flagdit.parallel.mesh import ParallelContext

FADE = 128
"""Samples of a sound over which old goes over to new."""


def edit(
    pipeline: Pipeline,
    samples: Sequence[Tensor],
    conditions: Sequence[Condition],
    cfg: SampleConfig,
    *,
    strength: float = 0.6,
    masks: Sequence[Tensor] | None = None,
    style: Tensor | None = None,
    first_id: int = 0,
    on_step: Progress | None = None,
) -> list[Tensor]:
    """Draws pictures, videos, views or sounds anew, starting from what they are.

    Args:
        pipeline: of the model, for the samples' modality.
        samples: pixels (3, F, H, W) or sounds (1, 1, 1, N) in [−1, 1], each of a size that the model can make.
        conditions: what each shall become.
        cfg: solver, guidance and seed; a later start skips the steps before it.
        strength: share of the way from noise that is drawn anew, above 0: small ones keep the layout, 1 keeps nothing
            (arXiv 2108.01073).
        masks: (F or 1, H, W) bool per sample, True where to draw; elsewhere the pixels stay exactly as they are. None:
            everywhere.
        style: a sample whose latent statistics the result starts from; see `match_statistics`.
        first_id, on_step: as for `Pipeline.generate`.

    Returns:
        Pixels (3, F, H, W) or sounds (1, 1, 1, N), fp32 on the CPU, one per sample.

    Raises:
        RecipeError: a strength, mask or size that cannot be met, or what `Pipeline.generate` raises.
    """
    frames = {s.shape[1] for s in samples}
    if len(frames) > 1:
        raise RecipeError("samples of different numbers of frames are edited one by one")
    for sample, mask in zip(samples, masks or (), strict=bool(masks)):
        if mask.shape[1:] != sample.shape[2:] or mask.shape[0] not in (1, sample.shape[1]):
            raise RecipeError(
                f"a mask of {mask.shape[2]}x{mask.shape[1]} does not fit a picture of "
                f"{sample.shape[3]}x{sample.shape[2]} pixels"
            )
    sizes = [(s.shape[3], s.shape[2]) for s in samples]
    cfg = replace(cfg, frames=samples[0].shape[1])
    for size in sizes:
        pipeline.latent_shape(size, cfg.frames, cfg.modality)  # a size that cannot be made is told before encoding
    latents = [pipeline.codec.encode(s) for s in samples]
    if style is not None:
        style_latent = pipeline.codec.encode(style)
        latents = [match_statistics(latent, style_latent) for latent in latents]
    keep = None if masks is None else [~pipeline.codec.latent_mask(m) for m in masks]
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
    # A latent covers several pixels, and an autoencoder loses a little: what is not masked comes from the sample.
    join = _faded if isinstance(pipeline.codec, MelCodec) else torch.where
    return [join(m[None], new, old) for m, new, old in zip(masks, drawn, samples, strict=True)]


def _faded(mask_CFHN: Tensor, new_CFHN: Tensor, old_CFHN: Tensor) -> Tensor:
    """A sound that is new where masked, and fades from old to new inside of the mask's ends: a jump would click."""
    inside = F.avg_pool1d(
        mask_CFHN[0].float(), 2 * FADE + 1, stride=1, padding=FADE, count_include_pad=False
    )  # half at an end of the mask
    return torch.lerp(old_CFHN, new_CFHN, (2 * inside - 1).clamp(min=0)[None])


def edit_file(
    run_dir: Path,
    file: Path,
    condition: Condition,
    out: Path | None = None,
    *,
    strength: float = 0.6,
    mask: Path | None = None,
    between: tuple[float, float] | None = None,
    style: Path | None = None,
    size: str | None = None,
    repeat: int = 1,
    step: int | None = None,
    ema: int | None = None,
    separate: bool = False,
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    mesh: ParallelContext | None = None,
) -> list[Path]:
    """`flagdit edit`: a picture, clip, strip of views or sound anew.

    Args:
        run_dir: the run folder.
        file: what to edit. Its modality is that of `settings`, or the first of the model's that its ending may mean.
        condition: what it shall become.
        out: file to write; None: a name by the modality.
        strength: see `edit`.
        mask: a file that is white where to draw; see `inputs.load_mask`.
        between: seconds of a clip or sound from which to which to draw.
        style: a file of the same kind whose statistics to take.
        size: "WIDTHxHEIGHT" to scale frames to first.
        repeat: versions, from different noise.
        step, ema, separate, preset_name, mesh: as for `sample.sample_to_files`.
        settings: as there; `frames` and `seconds` say how much of the file is taken, see `inputs.load_sample`.

    Returns:
        The files.

    Raises:
        RecipeError: files, sizes or settings that cannot be met.
        CheckpointError: the run cannot be read.
    """
    check_any_name(out)
    mesh = mesh or ParallelContext()
    check_one_sample(mesh)
    pipeline = load_pipeline(run_dir, step=step, ema=ema, mesh=mesh)
    given = {k: v for k, v in (settings or {}).items() if v is not None}
    modality = given.setdefault("modality", inputs.modality_for(file, pipeline.model.cfg.modalities))
    taken = {name: given.pop(name, None) for name in ("frames", "seconds")}
    cfg = settings_of(pipeline.recipe, preset_name, given)
    pipeline = pipeline.of(modality)
    out = out or Path("edited").with_suffix(Path(DEFAULT_NAMES[modality]).suffix)
    check_media_name(out, modality)
    sample = inputs.load_sample(file, pipeline, modality, size=parse_size(size) if size else None, **taken)
    rate = pipeline.recipe.audio.sample_rate
    masks = [] if mask is None else [inputs.load_mask(mask, pipeline, modality, sample)]
    masks += [] if between is None else [inputs.between(sample, modality, rate, *between)]
    where = [reduce(torch.logical_and, masks)] * repeat if masks else None
    with steps_shown("editing", repeat, max(round(cfg.steps * strength), 1)) as on_step:
        drawn = edit(
            pipeline,
            [sample] * repeat,
            [condition] * repeat,
            cfg,
            strength=strength,
            masks=where,
            style=None if style is None else inputs.load_sample(style, pipeline, modality),
            on_step=on_step,
        )
    return save_samples(drawn, modality, out, rate=rate, separate=separate) if mesh.is_first else []


def match_statistics(latent_CFHW: Tensor, style_CFHW: Tensor) -> Tensor:
    """The latent with the mean and standard deviation of every channel taken from another (arXiv 1703.06868).

    Channel statistics carry palette, brightness and contrast, and the rest the layout; so this moves a picture towards
    another's style without training, and sampling from it draws the details anew.
    """
    axes = (1, 2, 3)
    std, mean = torch.std_mean(latent_CFHW, axes, correction=0, keepdim=True)
    style_std, style_mean = torch.std_mean(style_CFHW, axes, correction=0, keepdim=True)
    return (latent_CFHW - mean) / std.clamp(min=1e-6) * style_std + style_mean
