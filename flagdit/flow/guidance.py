"""Classifier-free guidance (arXiv 2207.12598): away from the unconditional velocity, towards the conditional one.

Shape legend: S samples, N patch tokens of one modality, P features of a patch, ordered (C, pf, ph, pw).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    interval: Sequence[float] = (0.0, 1.0),
    rescale: float = 0.0,
    reuse: int = 1,
    null_text_LY: Tensor | None = None,
    null_label: int = 0,
    inference: Any = None,
) -> Velocity:
    """A velocity for `solver.integrate`: v = v_null + scale·(v_cond − v_null).

    Both halves run in one pack. With scale 1 there is no second half.

    Args:
        model: called as model(x, t_S, batch, inference).
        batch: geometry and conditions of the samples; its patches are not used.
        scale: 1 is no guidance.
        channels: latent channels that are guided, from the first; the others keep the conditional velocity. 0: all; the
            official code guides 3.
        interval: (from, to) times between which there is guidance; outside, the conditional half runs alone
            (arXiv 2404.07724).
        rescale: share φ by which the guided velocity takes the standard deviation of the conditional one, sample by
            sample, against overexposure (arXiv 2305.08891, section 3.4).
        reuse: the null half runs once in so many evaluations; those between take the difference of the last one.
        null_text_LY: features of the empty caption, for text-conditioned models.
        null_label: class id that means "no class", for class-conditioned models.
        inference: the model's inference settings, passed through; a function gives those of a time.
    """
    if scale == 1 or (batch.text is None and batch.labels_S is None):
        return _Conditional(model, batch, inference)
    everywhere = torch.ones(len(batch.segments), dtype=torch.bool)
    null = without_conditions(batch, everywhere, null_text_LY=null_text_LY, null_label=null_label)
    return _Guided(
        _Conditional(model, batch, inference),
        _Conditional(model, concat([batch, null]), inference),
        strength={s.modality: _strength(scale, channels, s.shape[0]) for s in batch.segments},
        interval=(interval[0], interval[1]),
        rescale=rescale,
        reuse=reuse,
    )


def _strength(scale: float, guided: int, channels: int) -> Tensor:
    """(C, 1) guidance scale of every channel."""
    strength_C1 = torch.full((channels, 1), scale)
    if guided:
        strength_C1[guided:] = 1
    return strength_C1


class _Conditional:
    """The model's velocity under the batch's own conditions."""

    def __init__(self, model: Callable[..., Patches], batch: PackedBatch, inference: Any):
        self.model, self.batch, self.inference = model, batch, inference

    def __call__(self, x: Patches, t: float) -> Patches:
        t_S = torch.full((len(self.batch.segments),), t, device=self.batch.layout.cu_seqlens.device)
        inference = self.inference(t) if callable(self.inference) else self.inference
        return self.model(x, t_S, self.batch, inference)


class _Guided:
    """Counts its evaluations, to know when the null half is due; made anew for every integration."""

    def __init__(
        self,
        alone: _Conditional,
        joint: _Conditional,
        *,
        strength: dict[str, Tensor],
        interval: tuple[float, float],
        rescale: float,
        reuse: int,
    ):
        self.alone, self.joint, self.strength = alone, joint, strength
        self.interval, self.rescale, self.reuse = interval, rescale, reuse
        self.evaluations = 0
        self.difference: Patches = {}

    def __call__(self, x: Patches, t: float) -> Patches:
        low, high = self.interval
        if not low <= t <= high:
            return self.alone(x, t)
        fresh = self.evaluations % self.reuse == 0
        self.evaluations += 1
        conditional = self._both(x, t) if fresh else self.alone(x, t)
        return {m: self._guide(m, v_NP) for m, v_NP in conditional.items()}

    def _both(self, x: Patches, t: float) -> Patches:
        """The conditional velocity, and its difference from the null one for this evaluation and the next ones."""
        halves = {m: v.chunk(2) for m, v in self.joint({m: torch.cat([v, v]) for m, v in x.items()}, t).items()}
        self.difference = {m: conditional - null for m, (conditional, null) in halves.items()}
        return {m: conditional for m, (conditional, _) in halves.items()}

    def _guide(self, modality: str, v_NP: Tensor) -> Tensor:
        strength_C1 = self.strength[modality].to(v_NP)
        towards_NP = self.difference[modality].unflatten(1, (len(strength_C1), -1))
        guided_NP = v_NP + ((strength_C1 - 1) * towards_NP).flatten(1)
        if not self.rescale:
            return guided_NP
        segment_N, count = self.alone.batch.layout.patch_segment[modality], len(self.alone.batch.segments)
        ratio_S = _deviation(v_NP, segment_N, count) / _deviation(guided_NP, segment_N, count).clamp(min=1e-12)
        factor_S = 1 + self.rescale * (ratio_S - 1)
        return guided_NP * factor_S[segment_N][:, None].to(v_NP)


def _deviation(v_NP: Tensor, segment_N: Tensor, count: int) -> Tensor:
    """(S,) standard deviation over the elements of every sample, in fp32; 0 for samples of other modalities."""
    v_NP = v_NP.float()
    sums = torch.stack([torch.ones_like(v_NP).sum(1), v_NP.sum(1), v_NP.square().sum(1)])
    count_S, sum_S, square_S = sums.new_zeros(3, count).index_add(1, segment_N, sums)
    count_S = count_S.clamp(min=1)
    mean_S = sum_S / count_S
    return (square_S / count_S - mean_S.square()).clamp(min=0).sqrt()
