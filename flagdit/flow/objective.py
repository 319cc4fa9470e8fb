"""What training minimizes. The trainer calls `loss` and knows no objective by name.

Shape legend: S samples, N patch tokens of one modality, P features of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flagdit.batch import PackedBatch, Patches
from flagdit.config.schema import FlowConfig
from flagdit.flow.noise import DROPOUT_STREAM, draw_uniform
from flagdit.flow.path import PathSample

Model = Callable[[Patches, Tensor, PackedBatch], Patches]
"""x_t, t_S and the batch that describes them → velocity."""

LARGEST_WEIGHT = 5.0


@dataclass(frozen=True)
class Loss:
    """What one micro-batch gives.

    Attributes:
        total: scalar to call backward on: this pack's part of the mean over the global batch.
        per_sample_S: (S,) unweighted mean squared errors, detached. Of a rank's share: its tokens' part of them, so
            that the sum over the ranks is the error.
    """

    total: Tensor
    per_sample_S: Tensor


class FlowMatching:
    """Conditional flow matching: mean squared error to the velocity x1 − x0 (arXiv 2405.05945, equation 3)."""

    def __init__(self, cfg: FlowConfig):
        self.cfg = cfg

    def count(self, batch: PackedBatch) -> int:
        """What a whole pack adds to the denominator of the mean: its samples, or its patch tokens under token
        weighting. A rank's share counts as the whole pack."""
        if batch.weightless:
            return 0
        if self.cfg.token_weighting == "token":
            assert batch.share is None, "count before sharing"
            return sum(len(index) for index in batch.layout.patch_index.values())
        return len(batch.segments)

    def loss(self, model: Model, batch: PackedBatch, path: PathSample, denominator: float | None = None) -> Loss:
        """The loss of one pack.

        Args:
            model: predicts the velocity.
            batch: conditions and geometry of the samples.
            path: their noised patches and velocities.
            denominator: sum of `count` over all packs of the step, on all ranks, so that the packs' losses add up to
                the mean over the global batch however it was split; None: this pack alone.
        """
        t_S, wanted = path.t_S, path.velocity
        predicted = model(path.x_t, t_S, batch)
        error_S = torch.zeros(len(batch.segments), device=t_S.device)
        for modality, want_NP in wanted.items():
            error_N = (predicted[modality].float() - want_NP).square().mean(dim=1)
            error_S = error_S.index_add(0, batch.layout.patch_segment[modality], error_N)
        width = {modality: want_NP.shape[1] for modality, want_NP in wanted.items()}
        patches_S = torch.tensor([math.prod(s.shape) // width[s.modality] for s in batch.segments]).to(t_S.device)
        mean_S = error_S / patches_S
        weighted_S = self.weight(t_S) * (error_S if self.cfg.token_weighting == "token" else mean_S)
        if batch.weightless:
            weighted_S = weighted_S * 0
        return Loss(weighted_S.sum() / max(denominator or self.count(batch), 1), mean_S.detach())

    def weight(self, t_S: Tensor) -> Tensor:
        """(S,) weight of each sample: 1, or 1/(1−t) up to 5."""
        if self.cfg.weighting == "snr":
            return (1 / (1 - t_S).clamp(min=1 / LARGEST_WEIGHT)).float()
        return torch.ones_like(t_S, dtype=torch.float32)


def drop_conditions(
    batch: PackedBatch, cfg: FlowConfig, seed: int, *, null_text_LY: Tensor | None, null_label: int
) -> PackedBatch:
    """Caption dropout for guidance (arXiv 2207.12598): some samples train without their caption or class.

    Args:
        null_text_LY: features of the empty caption; None for models without text.
        null_label: class id that means "no class".
    """
    if not cfg.caption_dropout:
        return batch
    drop_S = draw_uniform(batch, seed, DROPOUT_STREAM) < cfg.caption_dropout
    return without_conditions(batch, drop_S, null_text_LY=null_text_LY, null_label=null_label)


def without_conditions(
    batch: PackedBatch, where_S: Tensor, *, null_text_LY: Tensor | None, null_label: int
) -> PackedBatch:
    """The batch with the condition of the marked samples replaced by the null one.

    Args:
        where_S: (S,) bool on the CPU.
    """
    text, labels_S = batch.text, batch.labels_S
    if text is not None:
        assert null_text_LY is not None, "a text-conditioned batch needs the features of the empty caption"
        text = text.replaced(where_S.tolist(), null_text_LY)
    if labels_S is not None:
        labels_S = labels_S.masked_fill(where_S.to(labels_S.device), null_label)
    return replace(batch, text=text, labels_S=labels_S)
