"""Randomness that belongs to the sample.

Noise, timesteps and caption dropout are functions of (run seed, epoch, sample id) alone: counter-based random numbers
(Philox4x32-10, `kernels/flow_noise.py`), no generator state. Every topology, accumulation and resume therefore trains
on the same numbers, and a rank can draw exactly its part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flagdit.batch import PackedBatch, Patches
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
        ids = [s.sample_id for s in batch.segments if s.modality == modality]
        spans = batch.noise_spans(modality)
        if not any(length for _, length in spans):
            noise[modality] = torch.zeros_like(batch.patches[modality], dtype=torch.float32)
            continue
        flat = flow_noise.normal(
            seed,
            batch.epoch,
            torch.tensor(ids, dtype=torch.int64),
            [length for _, length in spans],
            index.device,
            [start for start, _ in spans],
        )
        noise[modality] = flat.view(len(index), -1)
    return noise


def draw_uniform(batch: PackedBatch, seed: int, stream: int) -> Tensor:
    """(S,) fp64 uniform numbers in (0, 1) on the CPU, one per sample of the pack and independent between streams."""
    ids = torch.tensor([s.sample_id for s in batch.segments], dtype=torch.int64)
    return flow_noise.uniform(seed, batch.epoch, ids, stream)
