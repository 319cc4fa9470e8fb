"""Which samples make global batch k: arithmetic on (seed, epoch, position), without a list and without state.

Each epoch is its own permutation of the split. A permutation of n samples is a Feistel network (Luby and Rackoff 1988)
on the smallest even number of bits that holds n, walked until it lands below n (Black and Rogaway 2002). So any batch
of any epoch costs the same, a run continues at sample ten million at once, and no rank or worker needs to agree with
another on anything but these integers.

An epoch is ⌊n / batch⌋ whole batches. The up to batch−1 samples that remain sit that epoch out: other ones each time,
as each epoch has another permutation.
"""

from __future__ import annotations

import numpy as np

from flagdit.errors import RecipeError

ROUNDS = 6
MIN_HALF_BITS = 3  # halves of fewer bits would make the rounds' values, and so small permutations, repeat too often


def batches_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole batches in one pass over the data.

    Raises:
        RecipeError: not even one.
    """
    if num_samples < batch_size:
        raise RecipeError(
            f"data.batch_size={batch_size} is larger than the split, which has {num_samples} samples",
            fix=f"Try {max(num_samples, 1)} or fewer.",
        )
    return num_samples // batch_size


def global_batch(seed: int, num_samples: int, batch_size: int, k: int) -> tuple[int, np.ndarray]:
    """Global batch k of the run.

    Args:
        seed: of the run.
        num_samples: samples in the split.
        batch_size: samples per batch, over all ranks.
        k: number of the batch, from 0.

    Returns:
        The epoch, and (batch_size,) int64 positions in the split, from 0 to num_samples−1, none twice in an epoch.

    Raises:
        RecipeError: the batch is larger than the split.
    """
    epoch, batch = divmod(k, batches_per_epoch(num_samples, batch_size))
    positions = np.arange(batch * batch_size, (batch + 1) * batch_size, dtype=np.uint64)
    return epoch, permute(seed, epoch, num_samples, positions)


def permute(seed: int, epoch: int, num_samples: int, positions: np.ndarray) -> np.ndarray:
    """Where the epoch's permutation sends each position: (len(positions),) int64 below `num_samples`."""
    half = np.uint64(max((max(num_samples - 1, 1).bit_length() + 1) // 2, MIN_HALF_BITS))
    keys = _mix(np.arange(ROUNDS, dtype=np.uint64) + _mix(np.uint64(seed & (2**64 - 1)) + _mix(np.uint64(epoch))))
    values = _feistel(positions.astype(np.uint64), half, keys)
    outside = values >= num_samples
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= num_samples
    return values.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of the numbers of 2·half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of a 64-bit number depends on every other."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        z = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
