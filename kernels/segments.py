"""Which rows of a packed tensor belong to which sample, in the form that kernels read.

Shape legend
    T, S  rows (tokens) and samples of the pack
    C     chunks: pieces of at most a few hundred rows, each inside one sample
    K, W  sums of one row, their width

A program owns one chunk. So it reads its sample's vectors once, and writes its part of their gradients as one row of
a (C, K·W) table, which `segment_sums` adds up in a fixed order: no atomics, the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagdit.kernels import language
from flagdit.kernels.language import jit, launch, tl

# About this many chunks a pack: a few waves of programs on a large GPU, while the table stays 2% of the traffic.
CHUNKS = 1024
SHORTEST_CHUNK = 16


@dataclass(frozen=True)
class Segments:
    """The samples of a pack.

    Attributes:
        chunks_C3: (C, 3) int32: first row, row after the last, sample.
        offsets_S: (S+1,) int32: chunks before each sample, and all of them.
        num_rows: T.
    """

    chunks_C3: Tensor
    offsets_S: Tensor
    num_rows: int

    @classmethod
    def build(cls, seqlens: Sequence[int], device: torch.device | str) -> Segments:
        """From the rows of each sample, which may be none (a rank may hold no row of a sample)."""
        lengths_S = torch.tensor(list(seqlens), dtype=torch.int64)
        num_rows = int(lengths_S.sum())
        rows = max(SHORTEST_CHUNK, language.next_power_of_2(max(1, num_rows // CHUNKS)))
        counts_S = (lengths_S + rows - 1) // rows
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts_S.cumsum(0)])
        sample_C = torch.repeat_interleave(torch.arange(len(lengths_S)), counts_S)
        ends_S = lengths_S.cumsum(0)
        within_C = torch.arange(len(sample_C)) - offsets[sample_C]
        first_C = (ends_S - lengths_S)[sample_C] + within_C * rows
        end_C = torch.minimum(first_C + rows, ends_S[sample_C])
        chunks_C3 = torch.stack([first_C, end_C, sample_C], dim=1).int()
        return cls(chunks_C3.to(device, non_blocking=True), offsets.int().to(device, non_blocking=True), num_rows)

    @property
    def ids_T(self) -> Tensor:
        """(T,) int64: the sample of each row."""
        return ids_of(self.chunks_C3, self.num_rows)


def ids_of(chunks_C3: Tensor, num_rows: int) -> Tensor:
    """(T,) int64: the sample of each row."""
    first_C, end_C, sample_C = chunks_C3.long().unbind(1)
    return torch.repeat_interleave(sample_C, end_C - first_C, output_size=num_rows)


@jit
def _segment_sums_kernel(parts, offsets, sums, blocks, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    segment = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        places = rows.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(parts + places, mask=(rows < end)[:, None] & inside[None, :], other=0.0)
    tl.store(sums + segment.to(tl.int64) * width + columns, tl.sum(total, 0), mask=inside)


def segment_sums(parts_CKW: Tensor, offsets_S: Tensor) -> Tensor:
    """Sums the chunks of every sample: (C, K, W) fp32 → (S, K, W) fp32; zero for samples without rows."""
    samples = len(offsets_S) - 1
    sums_SKW = language.empty((samples, *parts_CKW.shape[1:]), torch.float32, parts_CKW.device)
    width, block = parts_CKW.shape[1] * parts_CKW.shape[2], 64
    blocks = -(-width // block)
    launch(
        _segment_sums_kernel,
        samples * blocks,
        {
            "parts": parts_CKW,
            "offsets": offsets_S,
            "sums": sums_SKW,
            "blocks": blocks,
            "width": width,
            "BLOCK": block,
            "ROWS": 16,
        },
        num_warps=4,
    )
    return sums_SKW
