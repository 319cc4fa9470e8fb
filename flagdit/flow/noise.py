"""Randomness that belongs to the sample.

Noise, timesteps and caption dropout are functions of (run seed, epoch, sample id) alone: counter-based random numbers
(Philox4x32-10, `kernels/flow_noise.py`), no generator state. Every topology, accumulation and resume therefore trains
on the same numbers, and a rank can draw exactly its part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flagdit.batch import PackedBatch, Patches, Segment
from flagdit.kernels import flow_noise

# Independent streams of one sample; `flow_noise.normal` has its own.
TIMESTEP_STREAM = 1
DROPOUT_STREAM = 2


def draw_noise(batch: PackedBatch, seed: int) -> Patches:
    """Standard normal noise for every sample of a pack, in patch order; of a rank's share, exactly its part.

    Args:
        batch: gives identity, size and epoch of the samples; its patches may be empty.
        seed: of the run.

    Returns:
        fp32 noise (N, P) by modality, on the layout's device.
    """
    noise = {}
    for modality, index in batch.layout.patch_index.items():
        own = [s for s in batch.segments if s.modality == modality]
        spans = batch.noise_spans(modality)
        if not any(length for _, length in spans):
            noise[modality] = torch.zeros_like(batch.patches[modality], dtype=torch.float32)
            continue
        parts: list[Tensor] = [torch.empty(0)] * len(own)
        # Nearly always one epoch, and then one call; where data sets or epochs meet in a pack, one for each.
        for epoch, places in _by_epoch(own).items():
            ids = torch.tensor([own[i].sample_id for i in places], dtype=torch.int64)
            lengths, starts = [spans[i][1] for i in places], [spans[i][0] for i in places]
            flat = flow_noise.normal(seed, epoch, ids, lengths, index.device, starts)
            if len(places) == len(own):
                parts = [flat]
                break
            for i, part in zip(places, flat.split(lengths), strict=True):
                parts[i] = part
        noise[modality] = torch.cat(parts).view(len(index), -1)
    return noise


def draw_uniform(batch: PackedBatch, seed: int, stream: int) -> Tensor:
    """(S,) fp64 uniform numbers in (0, 1) on the CPU, one per sample of the pack and independent between streams."""
    drawn_S = torch.empty(len(batch.segments), dtype=torch.float64)
    for epoch, places in _by_epoch(batch.segments).items():
        ids = torch.tensor([batch.segments[i].sample_id for i in places], dtype=torch.int64)
        drawn_S[torch.tensor(places)] = flow_noise.uniform(seed, epoch, ids, stream)
    return drawn_S


def _by_epoch(segments: Sequence[Segment]) -> dict[int, list[int]]:
    """Epoch → places of its segments."""
    found: dict[int, list[int]] = {}
    for i, segment in enumerate(segments):
        found.setdefault(segment.epoch, []).append(i)
    return found
