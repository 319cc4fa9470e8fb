"""Which samples come next: arithmetic on (seed, epoch, position), without a list and without state.

A data set is an endless stream, one epoch after another, and each epoch holds every sample of the split once. An epoch
shuffles the shards, cuts them into groups, and shuffles the samples of each group: reads stay within a few shards at a
time, which parallel file systems and object stores like, and a set that is one group is shuffled as a whole.

A permutation of n samples is a Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds
n, walked until it lands below n (Black and Rogaway 2002). So any place of any epoch costs the same, a run continues at
sample ten million at once, and no rank or worker needs to agree with another on anything but these integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROUNDS = 6
MIN_HALF_BITS = 3  # halves of fewer bits would make the rounds' values, and so small permutations, repeat too often
EPOCHS_KEPT, GROUPS_KEPT = 2, 16


@dataclass(frozen=True)
class Drawn:
    """Samples of one data set, in the order of its stream.

    Attributes:
        ids: (n,) int64 sample ids in the data set.
        epochs: (n,) int64, the pass over the data set that each belongs to.
    """

    ids: np.ndarray
    epochs: np.ndarray


class SetOrder:
    """The stream of one data set, cut at any place.

    Places are counted in units: samples, or tokens where `lengths` are given. A sample stands at the place where it
    begins, so any partition of the stream into intervals holds every sample of every epoch once.

    Attributes:
        units: units of one epoch.
    """

    def __init__(self, seed: int, shards: np.ndarray, first_id: int, per_group: int, lengths: np.ndarray | None = None):
        """
        Args:
            seed: of the run, mixed with what tells this data set from others.
            shards: (n,) samples in each shard; the shards' ids follow one another.
            first_id: id of the first sample of the first shard.
            per_group: shards that are shuffled together.
            lengths: (samples,) units of every sample, at least 1; None: one each.
        """
        self.seed, self.per_group, self.lengths, self.first_id = seed, per_group, lengths, first_id
        self._starts = np.concatenate([[0], np.cumsum(shards, dtype=np.int64)])
        filled = shards > 0
        self._sizes = np.asarray(shards, np.int64)
        if lengths is None:
            self._units = self._sizes
        else:
            self._units = np.zeros(len(shards), np.int64)
            self._units[filled] = np.add.reduceat(lengths, self._starts[:-1][filled], dtype=np.int64)
        self.units = int(self._units.sum())
        self._epoch: Callable[[int], tuple[np.ndarray, np.ndarray]] = lru_cache(EPOCHS_KEPT)(self._make_epoch)
        self._group: Callable[[int, int], tuple[np.ndarray, np.ndarray]] = lru_cache(GROUPS_KEPT)(self._make_group)

    def take(self, start: int, stop: int) -> Drawn:
        """The samples that begin at places start ≤ place < stop of the stream."""
        ids, epochs = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for epoch in range(start // self.units, -(-stop // self.units)):
            low, high = start - epoch * self.units, stop - epoch * self.units
            _, ends = self._epoch(epoch)
            first = int(np.searchsorted(ends, max(low, 0), side="right"))
            last = int(np.searchsorted(ends, min(high, self.units), side="left"))
            for group in range(first, min(last, len(ends) - 1) + 1):
                members, places = self._group(epoch, group)
                a, b = np.searchsorted(places, (low, high), side="left")
                ids.append(members[a:b])
                epochs.append(np.full(b - a, epoch, np.int64))
        return Drawn(np.concatenate(ids) + self.first_id, np.concatenate(epochs))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the place where each of its groups ends."""
        shards = permute(self.seed, epoch, len(self._sizes), np.arange(len(self._sizes)))
        last = np.arange(self.per_group, len(shards) + self.per_group, self.per_group).clip(max=len(shards)) - 1
        return shards, np.cumsum(self._units[shards])[last]

    def _make_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a group in their order, counted from the first of the split, and the places of the epoch at
        which they begin."""
        shards, ends = self._epoch(epoch)
        chosen = shards[group * self.per_group : (group + 1) * self.per_group]
        members = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
        mixed = int(_mix(np.uint64(group + 1))) ^ (self.seed & (2**64 - 1))
        members = members[permute(mixed, epoch, len(members), np.arange(len(members)))] if len(members) else members
        begin = int(ends[group - 1]) if group else 0
        if self.lengths is None:
            return members, begin + np.arange(len(members))
        steps = np.cumsum(self.lengths[members], dtype=np.int64)
        return members, begin + np.concatenate([[0], steps[:-1]]) if len(members) else steps


def permute(seed: int, epoch: int, num_samples: int, positions: np.ndarray) -> np.ndarray:
    """Where the epoch's permutation sends each position: (len(positions),) int64 below `num_samples`."""
    half = np.uint64(max((max(num_samples - 1, 1).bit_length() + 1) // 2, MIN_HALF_BITS))
    keys = _mix(_plus(np.arange(ROUNDS), _mix(_plus(seed & (2**64 - 1), _mix(np.uint64(epoch))))))
    values = _feistel(positions.astype(np.uint64), half, keys)
    outside = values >= num_samples
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= num_samples
    return values.astype(np.int64)


def mixed_seed(seed: int, number: int) -> int:
    """A seed for the number-th of several independent orders; number 0 keeps the seed."""
    return seed if number == 0 else int(_mix(_plus(seed & (2**64 - 1), _mix(np.uint64(number)))))


def _feistel(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of the numbers of 2·half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _plus(a: int | np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        return np.asarray(a, np.uint64) + np.asarray(b, np.uint64)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of a 64-bit number depends on every other."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        z = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
