"""From a velocity and noise, or something between noise and data, to latents.

Shape legend
    C, F, H, W  channels, frames or views, rows, columns of a latent
    N, P        patch tokens of one modality, features of a patch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagdit.batch import PackedBatch, Patches, Segment
from flagdit.config.schema import SampleConfig
from flagdit.errors import RecipeError
from flagdit.flow.compose import hold
from flagdit.flow.noise import draw_noise
from flagdit.flow.solver import Solution, Velocity, integrate
from flagdit.flow.timesteps import shift_of
from flagdit.model.tokens import TokenSpec, modality_of, patchify


@dataclass(frozen=True)
class Start:
    """What sampling starts from, beside noise: something known of every sample.

    Attributes:
        latents: one (C, F, H, W) per sample: x1.
        strength: share of the way from noise to data that is drawn anew, above 0: sampling starts at t = 1 − strength
            from t·x1 + (1 − t)·x0. 1: from noise alone.
        keep: one bool tensor per sample that expands to its latent: True where x1 stays as it is; None: nowhere.
    """

    latents: Sequence[Tensor]
    strength: float = 1.0
    keep: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise RecipeError(
                f"a strength of {self.strength:g} must be above 0 and at most 1",
                fix="Small ones keep most of the picture, 1 keeps nothing of it.",
            )

    def __getitem__(self, part: slice) -> Start:
        return Start(self.latents[part], self.strength, self.keep and self.keep[part])


def solve(
    velocity: Velocity,
    batch: PackedBatch,
    spec: TokenSpec,
    cfg: SampleConfig,
    start: Start | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Solution:
    """Follows the flow of one pack.

    Args:
        velocity: of the pack.
        batch: identity and geometry of the samples, all of one number of tokens where `sample.shift_tokens` counts.
        spec: how the model cuts latents.
        cfg: seed, solver and time grid.
        start: None: noise.
        on_step: called with the number of finished steps.

    Returns:
        Patches of the data and the number of evaluations.
    """
    noise = draw_noise(batch, cfg.seed)
    x, begin = noise, 0.0
    if start is not None:
        begin = 1.0 - start.strength
        data = _patches(start.latents, batch.segments, spec, noise)
        x = {m: begin * data[m] + (1 - begin) * noise[m] for m in noise}
        if start.keep is not None:
            whole = [k.expand_as(x1) for k, x1 in zip(start.keep, start.latents, strict=True)]
            velocity = hold(velocity, data, noise, _patches(whole, batch.segments, spec, noise))
    return integrate(
        velocity,
        x,
        solver=cfg.solver,
        steps=cfg.steps,
        shift=shift_of(max(batch.layout.seqlens), cfg),
        schedule=cfg.schedule,
        start=begin,
        rtol=cfg.rtol,
        atol=cfg.atol,
        on_step=on_step,
    )


def _patches(latents: Sequence[Tensor], segments: Sequence[Segment], spec: TokenSpec, like: Patches) -> Patches:
    """Latents or masks (C, F, H, W) → (N, P) by modality, on the device of `like`."""
    parts: dict[str, list[Tensor]] = {}
    for segment, latent in zip(segments, latents, strict=True):
        assert tuple(latent.shape) == segment.shape, f"a latent of {tuple(latent.shape)} for {segment.shape}"
        parts.setdefault(segment.modality, []).append(
            patchify(latent, modality_of(segment.modality).patch(spec.patch_size))
        )
    return {m: torch.cat(rows).to(like[m].device) for m, rows in parts.items()}
