"""Classifier-free guidance (arXiv 2207.12598): away from the unconditional velocity, towards the conditional one.

Shape legend: S samples, N patch tokens of one modality, P features of a patch, ordered (C, pf, ph, pw).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flagdit.batch import PackedBatch, Patches, concat
from flagdit.flow.objective import without_conditions
from flagdit.flow.solver import Velocity


def guided_velocity(
    model: Callable[..., Patches],
    batch: PackedBatch,
    *,
    scale: float,
    channels: int = 0,
    null_text_LY: Tensor | None = None,
    null_label: int = 0,
    inference: object = None,
) -> Velocity:
    """A velocity for `solver.integrate`: v = v_null + scale·(v_cond − v_null).

    Both halves run in one pack. With scale 1 there is no second half.

    Args:
        model: called as model(x, t_S, batch, inference).
        batch: geometry and conditions of the samples; its patches are not used.
        scale: 1 is no guidance.
        channels: latent channels that are guided, from the first; the others keep the conditional velocity. 0: all; the
            official code guides 3.
        null_text_LY: features of the empty caption, for text-conditioned models.
        null_label: class id that means "no class", for class-conditioned models.
        inference: the model's inference settings, passed through.
    """
    count = len(batch.segments)
    device = batch.layout.cu_seqlens.device
    if scale == 1 or (batch.text is None and batch.labels_S is None):

        def conditional(x: Patches, t: float) -> Patches:
            return model(x, torch.full((count,), t, device=device), batch, inference)

        return conditional

    everywhere = torch.ones(count, dtype=torch.bool)
    null = without_conditions(batch, everywhere, null_text_LY=null_text_LY, null_label=null_label)
    joint = concat([batch, null])
    channels_of = {s.modality: s.shape[0] for s in batch.segments}

    def guided(x: Patches, t: float) -> Patches:
        t_S = torch.full((2 * count,), t, device=device)
        both = model({m: torch.cat([x_NP, x_NP]) for m, x_NP in x.items()}, t_S, joint, inference)
        velocity = {}
        for modality, v in both.items():
            conditional_NP, null_NP = v.chunk(2)
            strength = torch.full((v.shape[1],), scale, device=v.device, dtype=v.dtype)
            if channels:
                strength[channels * v.shape[1] // channels_of[modality] :] = 1
            velocity[modality] = null_NP + strength * (conditional_NP - null_NP)
        return velocity

    return guided
