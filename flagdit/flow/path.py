"""The linear path between noise and data (arXiv 2405.05945, section 2.1; arXiv 2209.03003).

x_t = t·x1 + (1−t)·x0 with x0 noise and x1 data, so that t = 0 is noise and t = 1 is data. Along it the velocity is
constant: dx_t/dt = x1 − x0, the target of flow matching.

Shape legend: S samples, N patch tokens of one modality, P features of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flagdit.batch import PackedBatch, Patches
from flagdit.flow.noise import draws_of
from flagdit.kernels import flow_noise


@dataclass(frozen=True)
class PathSample:
    """The samples of a pack, each at its own time on its path.

    Attributes:
        t_S: (S,) times in [0, 1].
        x_t: noised patches, fp32 (N, P) by modality.
        velocity: dx_t/dt, fp32 (N, P) by modality: what the model is to predict.
    """

    t_S: Tensor
    x_t: Patches
    velocity: Patches


def per_patch(value_S: Tensor, batch: PackedBatch, modality: str) -> Tensor:
    """One value per sample → (N,), one per patch token of a modality."""
    return value_S[batch.layout.patch_segment[modality]]


def between(batch: PackedBatch, noise: Patches, t_S: Tensor) -> PathSample:
    """The path from given noise.

    Args:
        batch: holds the clean patches x1.
        noise: x0, shaped as the patches.
        t_S: (S,) times in [0, 1].
    """
    x_t, velocity = {}, {}
    for modality, x1_NP in batch.patches.items():
        t_N1 = per_patch(t_S, batch, modality).to(noise[modality])[:, None]
        x_t[modality] = t_N1 * x1_NP + (1 - t_N1) * noise[modality]
        velocity[modality] = x1_NP - noise[modality]
    return PathSample(t_S, x_t, velocity)


def draw_path(batch: PackedBatch, t_S: Tensor, seed: int, kernels: str = "auto") -> PathSample:
    """`between` with the noise of `draw_noise`: the same bits, on GPUs in one pass that never writes the noise.

    Args:
        batch: whole packs, or a rank's share of one.
        t_S: (S,) times in [0, 1].
        seed: of the run.
        kernels: auto, triton or reference, as in the recipe's `model.kernels`.
    """
    x_t, velocity = {}, {}
    for modality, x1_NP in batch.patches.items():
        draws = draws_of(batch, modality)
        if any(draws["lengths_S"]):
            own_S = [i for i, s in enumerate(batch.segments) if s.modality == modality]
            pair = flow_noise.flow_noise(x1_NP, t_S[own_S], seed, backend=kernels, **draws)
        else:
            pair = x1_NP.float(), x1_NP.float()
        x_t[modality], velocity[modality] = pair
    return PathSample(t_S, x_t, velocity)
