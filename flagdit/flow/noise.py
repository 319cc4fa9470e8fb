"""Randomness that belongs to the sample.

Noise, timesteps and caption dropout are functions of (run seed, epoch, sample id) alone: counter-based random numbers
(Philox4x32-10, `kernels/flow_noise.py`), no generator state. Every topology, accumulation and resume therefore trains
on the same numbers, and a rank can draw exactly its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from flagdit.batch import PackedBatch, Patches, Segment
from flagdit.kernels import flow_noise

# Independent streams of one sample; `flow_noise.normal` has its own.
TIMESTEP_STREAM = 1
DROPOUT_STREAM = 2


class Draws(TypedDict):
    """Which numbers are a modality's: the arguments of `kernels.flow_noise` but the seed."""

    epoch: Tensor
    sample_ids_S: Tensor
    lengths_S: list[int]
    starts_S: list[int]


def draws_of(batch: PackedBatch, modality: str) -> Draws:
    """The numbers that a pack's samples of one modality take, or of a rank's share exactly its part."""
    own = [s for s in batch.segments if s.modality == modality]
    epoch_S, ids_S = _identity(own)
    spans = batch.noise_spans(modality)
    return {
        "epoch": epoch_S,
        "sample_ids_S": ids_S,
        "lengths_S": [n for _, n in spans],
        "starts_S": [s for s, _ in spans],
    }


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
        draws = draws_of(batch, modality)
        if any(draws["lengths_S"]):
            noise[modality] = flow_noise.normal(seed, device=index.device, **draws).view(len(index), -1)
        else:
            noise[modality] = torch.zeros_like(batch.patches[modality], dtype=torch.float32)
    return noise


def draw_uniform(batch: PackedBatch, seed: int, stream: int) -> Tensor:
    """(S,) fp64 uniform numbers in (0, 1) on the CPU, one per sample of the pack and independent between streams."""
    epoch_S, ids_S = _identity(batch.segments)
    return flow_noise.uniform(seed, epoch_S, ids_S, stream)


def _identity(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Epochs and ids, (S,) int64 each."""
    epochs, ids = [s.epoch for s in segments], [s.sample_id for s in segments]
    return torch.tensor(epochs, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64)
