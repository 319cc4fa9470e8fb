"""The linear path between noise and data (arXiv 2405.05945, section 2.1; arXiv 2209.03003).

x_t = t·x1 + (1−t)·x0 with x0 noise and x1 data, so that t = 0 is noise and t = 1 is data. Along it the velocity is
constant: dx_t/dt = x1 − x0, the target of flow matching.

Shape legend: S samples, N patch tokens of one modality, P features of a patch.
"""

from __future__ import annotations

from torch import Tensor

from flagdit.batch import PackedBatch, Patches


def per_patch(value_S: Tensor, batch: PackedBatch, modality: str) -> Tensor:
    """One value per sample → (N,), one per patch token of a modality."""
    return value_S[batch.layout.patch_segment[modality]]


def interpolate(batch: PackedBatch, noise: Patches, t_S: Tensor) -> Patches:
    """x_t of every sample at its own time, fp32 (N, P) by modality.

    Args:
        batch: holds the clean patches x1.
        noise: x0, shaped as the patches.
        t_S: (S,) times in [0, 1].
    """
    mixed = {}
    for modality, x1_NP in batch.patches.items():
        t_N1 = per_patch(t_S, batch, modality).to(noise[modality])[:, None]
        mixed[modality] = t_N1 * x1_NP + (1 - t_N1) * noise[modality]
    return mixed


def target(batch: PackedBatch, noise: Patches) -> Patches:
    """The velocity x1 − x0, (N, P) by modality."""
    return {modality: x1_NP - noise[modality] for modality, x1_NP in batch.patches.items()}
