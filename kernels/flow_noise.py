"""Counter-based random numbers for flow matching: every number is a function of (seed, epoch, sample, element).

Philox4x32-10 (Salmon et al., SC 2011) maps a 128-bit counter under a 64-bit key to four 32-bit words, with no state in
between. So any rank can draw exactly the elements that it holds, and every device draws the same.

    key      seed, low and high word
    counter  (element // 4, sample id low word, sample id bits 32–47 | stream << 16, epoch)

Word `element % 4` belongs to the element. Normals are Box–Muller pairs in fp32: words 0 and 1 give elements 0 and 1,
words 2 and 3 give elements 2 and 3, from uniforms u = (word >> 8 + ½)·2⁻²⁴, so that |z| < 5.9. The words are the same
bits on every device; normals agree to the rounding of log, cos and sin.

Shape legend: S samples, B counter blocks of four elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

NORMAL_STREAM = 0


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each holding 32-bit words.
        seed: the 64-bit key.

    Returns:
        Four int64 tensors of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits; the mask undoes the sign of the shift.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK
        c2, c3 = (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + KEY_STEPS[0] & MASK, k1 + KEY_STEPS[1] & MASK
    return c0, c1, c2, c3


def _counter(block_B: Tensor, sample_id_B: Tensor, epoch: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    high = (sample_id_B >> 32) & 0xFFFF | stream << 16
    return block_B, sample_id_B & MASK, high, torch.full_like(block_B, epoch & MASK)


def normal(seed: int, epoch: int, sample_ids_S: Tensor, lengths_S: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal noise of several samples, one after the other.

    Args:
        seed: of the run.
        epoch: pass over the data.
        sample_ids_S: (S,) int64, below 2^48.
        lengths_S: elements of each sample, below 2^34.
        device: where the noise is made.

    Returns:
        (sum of lengths,) fp32.
    """
    blocks_S = [(n + 3) // 4 for n in lengths_S]
    counts_S = torch.tensor(blocks_S, device=device)
    ids_B = torch.repeat_interleave(sample_ids_S.to(device), counts_S)
    starts_S = counts_S.cumsum(0) - counts_S
    block_B = torch.arange(len(ids_B), device=device) - torch.repeat_interleave(starts_S, counts_S)
    words = torch.stack(philox(_counter(block_B, ids_B, epoch, NORMAL_STREAM), seed))
    u = ((words >> 8).float() + 0.5) * 2.0**-24
    radius, angle = (-2 * u[0::2].log()).sqrt(), 2 * math.pi * u[1::2]
    z_B4 = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten(0, 1).T
    if all(n % 4 == 0 for n in lengths_S):
        return z_B4.reshape(-1)
    parts = z_B4.reshape(-1).split([4 * n for n in blocks_S])
    return torch.cat([part[:n] for part, n in zip(parts, lengths_S, strict=True)])


def uniform(seed: int, epoch: int, sample_ids_S: Tensor, stream: int) -> Tensor:
    """One uniform number in (0, 1) per sample.

    Args:
        seed: of the run.
        epoch: pass over the data.
        sample_ids_S: (S,) int64, below 2^48.
        stream: 1 to 65535; streams are independent of one another and of the noise.

    Returns:
        (S,) fp64 with 52 random bits, on the ids' device.
    """
    assert NORMAL_STREAM < stream < 1 << 16
    first, second, _, _ = philox(_counter(torch.zeros_like(sample_ids_S), sample_ids_S, epoch, stream), seed)
    return ((first << 20 | second >> 12).double() + 0.5) * 2.0**-52
