"""Which samples come next: arithmetic on (seed, epoch, place), without a list and without state.

A data set is an endless stream, one epoch after another, and each epoch holds every sample of the split once. An epoch
shuffles the shards, cuts them into groups, and shuffles the samples of each group: reads stay within a few shards at a
time, which parallel file systems and object stores like, and a set that is one group is shuffled as a whole.

Where samples are of several kinds (of several lengths), the samples of each kind are a stream of their own, in the
same order of shards: who takes every kind at its own steady rate stays near one place of the shards, too.

A permutation of n samples is a Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds
n, walked until it lands below n (Black and Rogaway 2002). So any place of any epoch costs the same, a run continues at
sample ten million at once, and no rank or worker needs to agree with another on anything but these integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

ROUNDS = 6
MIN_HALF_BITS = 3  # halves of fewer bits would make the rounds' values, and so small permutations, repeat too often
EPOCHS_KEPT, GROUPS_KEPT = 4, 64


@dataclass(frozen=True)
class Drawn:
    """Samples of one data set, in the order asked for.

    Attributes:
        ids: (n,) int64 sample ids in the data set.
        epochs: (n,) int64, the pass over the data set that each belongs to.
    """

    ids: np.ndarray
    epochs: np.ndarray


class SetOrder:
    """The streams of one data set, one for each kind of sample, readable at any place.

    Attributes:
        counts: (K,) int64 samples of each kind in an epoch.
    """

    def __init__(self, seed: int, shards: np.ndarray, first_id: int, per_group: int, kinds: np.ndarray | None = None):
        """
        Args:
            seed: of the run, mixed with what tells this data set from others.
            shards: (n,) samples in each shard; the shards' ids follow one another.
            first_id: id of the first sample of the first shard.
            per_group: shards that are shuffled together.
            kinds: (samples,) kind of every sample, from 0; None: all are of one.
        """
        self.seed, self.per_group, self.first_id, self._kinds = seed, per_group, first_id, kinds
        self._starts = np.concatenate([[0], np.cumsum(shards, dtype=np.int64)])
        if kinds is None:
            self._in_shards = np.asarray(shards, np.int64)[:, None]
        else:
            number = int(kinds.max()) + 1
            of_shards = [np.bincount(kinds[a:b], minlength=number) for a, b in pairwise(self._starts.tolist())]
            self._in_shards = np.stack(of_shards).astype(np.int32)
        self.counts = self._in_shards.sum(axis=0, dtype=np.int64)
        self._before = np.cumsum(self.counts) - self.counts
        self._epoch: Callable[[int], tuple[np.ndarray, np.ndarray]] = lru_cache(EPOCHS_KEPT)(self._make_epoch)
        self._group: Callable[[int, int], tuple[np.ndarray, np.ndarray]] = lru_cache(GROUPS_KEPT)(self._make_group)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self._starts[-1])

    def take(self, start: int, stop: int) -> Drawn:
        """Samples start to stop − 1 of the stream of a data set of one kind."""
        return self.at(np.zeros(stop - start, np.int64), np.arange(start, stop))

    def at(self, kinds: np.ndarray, places: np.ndarray) -> Drawn:
        """The samples at (n,) places of the streams of (n,) kinds."""
        epochs, places = np.divmod(places, self.counts[kinds])
        ids = np.empty(len(kinds), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            _, ends = self._epoch(epoch)
            num_groups = len(ends) // len(self.counts)
            counted = self._before[kinds[rows]] + places[rows]
            groups = np.searchsorted(ends, counted, side="right") - kinds[rows] * num_groups
            for group in np.unique(groups).tolist():
                members, first = self._group(epoch, group)
                here = groups == group
                ids[rows[here]] = members[counted[here] - first[kinds[rows[here]]]]
        return Drawn(ids + self.first_id, epochs)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where each kind's samples of each group end, all kinds one after another:
        (kinds · groups,) ascending."""
        shards = permute(self.seed, epoch, len(self._in_shards), np.arange(len(self._in_shards)))
        in_groups = np.add.reduceat(self._in_shards[shards], np.arange(0, len(shards), self.per_group), dtype=np.int64)
        return shards, np.cumsum(in_groups.T.ravel())

    def _make_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a group, counted from the first of the split, kind after kind and each in its order; and for
        each kind what to subtract from a place to find it here. Places are counted as the ends of groups are."""
        shards, ends = self._epoch(epoch)
        chosen = shards[group * self.per_group : (group + 1) * self.per_group]
        members = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
        mixed = int(_mix(np.uint64(group + 1))) ^ (self.seed & (2**64 - 1))
        members = members[permute(mixed, epoch, len(members), np.arange(len(members)))]
        if self._kinds is not None:
            members = members[np.argsort(self._kinds[members], kind="stable")]
        in_group = self._in_shards[chosen].sum(axis=0, dtype=np.int64)
        ends_here = ends.reshape(len(self.counts), -1)[:, group]
        return members, ends_here - np.cumsum(in_group)


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
