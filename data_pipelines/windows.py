"""How every window of packs is filled: settled once for a run, from the lengths of its samples alone.

All samples of the run, longest first and each as wide as its share, are cut into n strata of equal width, and every
window takes one sample of each stratum. So windows are alike, and the j-th longest sample of any window is at most as
long as the longest of stratum j, its *slot*. The slots are packed once. Whatever fits there fits in every window: no
pack ever goes over its budget, wherever a run is entered, and no window waits for another. What that costs is half of
the difference between the longest and the shortest sample, once a window.

Where in its strata window w takes its samples is the w-th number of van der Corput's sequence (1935). So every kind of
sample is drawn at its own rate, evenly, and how often it was drawn before is found by a sum over the bits of w.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flagdit.data_pipelines.packing import EVEN, LESS_EVEN, WAYS, pack_window

BITS = 32
"""Of the fraction of a stratum: numbers of windows and places in strata are exact integers in units of 2⁻³²."""
ONE = np.int64(1) << BITS
JOINED = 0.002 / 512
"""Share of a data set's tokens that a kind of several lengths may waste by counting all of them as the longest."""
LITTLE = (0.001, 0.002, 0.004, 0.008)
UNFILLED = (*LITTLE, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5)
"""Shares of the budget to leave empty. Packs that cost alike are worth a little."""
REFINED = 4


def kinds_of(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts samples into kinds of nearly one length. A length that is rare is counted as the next longer one.

    Args:
        tokens: (samples,) of each.

    Returns:
        (samples,) kind of each, and (kinds,) int64 tokens of the longest of each kind, falling.
    """
    counts = np.bincount(tokens)
    most = JOINED * float(tokens.sum())
    longest: list[int] = []
    wasted = np.inf
    for n in np.flatnonzero(counts)[::-1].tolist():
        wasted += (longest[-1] - n) * int(counts[n]) if longest else 0
        if wasted > most:
            longest.append(n)
            wasted = 0.0
    begins = np.zeros(len(counts), np.min_scalar_type(len(longest)))
    begins[longest] = 1
    kind_of_length = np.cumsum(begins[::-1], dtype=begins.dtype)[::-1] - 1
    return kind_of_length.astype(begins.dtype)[tokens], np.array(longest, np.int64)


class Windows:
    """Which kinds of samples a window has, in which packs, and how many of each kind came before.

    Attributes:
        packs: of a window.
        slots: (n,) tokens that the samples of a window have at the most, falling.
        pack_of_slot: (n,) int64.
        fill: share of the budget that samples fill, on average.
    """

    def __init__(self, lengths: np.ndarray, shares: np.ndarray, packs: int, budget: int):
        """
        Args:
            lengths: (K,) tokens of the longest sample of each kind, falling, at most the budget.
            shares: (K,) of the samples drawn that are of each kind; they add up to 1.
            packs: of a window.
            budget: tokens of a pack.
        """
        assert (np.diff(lengths) <= 0).all() and lengths[0] <= budget
        self.packs, self._lengths, self._shares = packs, lengths, shares
        mean = float(lengths @ shares)
        number, made = self._choose(int(packs * budget / mean), budget)
        self._ends = self._ends_of(number)
        self.slots = lengths[self.kinds(0)]
        self.fill = number * mean / (packs * budget)
        self.pack_of_slot = np.empty(number, np.int64)
        for pack, slots in enumerate(made):
            self.pack_of_slot[slots] = pack

    def kinds(self, w: int) -> np.ndarray:
        """(n,) kind of the sample in each slot of window w, ascending: the longest come first."""
        number = int(self._ends[-1] >> BITS)
        return np.searchsorted(self._ends, np.arange(number) * ONE + _van_der_corput(w), side="right")

    def before(self, w: int) -> np.ndarray:
        """(K,) int64 samples of each kind in windows 0 to w − 1."""
        whole, part = self._ends >> BITS, self._ends & (ONE - 1)
        up_to = w * whole
        at = 0
        for bit in reversed(range(w.bit_length())):
            if w >> bit & 1:  # windows at to at + 2**bit − 1: one place in each of 2**bit equal intervals
                shift = BITS - bit
                up_to += np.maximum((part - _van_der_corput(at) + (1 << shift) - 1) >> shift, 0)
                at += 1 << bit
        return np.diff(up_to, prepend=0)

    def _ends_of(self, number: int) -> np.ndarray:
        """(K,) int64 where each kind ends among so many strata, in units of 2⁻³²."""
        ends = np.rint(np.cumsum(self._shares) * number * float(ONE)).astype(np.int64)
        ends[-1] = number * ONE
        return ends

    def _choose(self, most: int, budget: int) -> tuple[int, list[list[int]]]:
        """How many strata, up to `most`, and the packs of their slots: alike in cost, where these are full enough."""
        choices: list[tuple[Sequence[int], Sequence[float]]] = [
            ([EVEN], LITTLE),
            ([LESS_EVEN], LITTLE),
            (WAYS, UNFILLED),
        ]
        for ways, unfilled in choices:
            if (found := self._most_that_fit(most, budget, ways, unfilled)) is not None:
                return found
        return self.packs, [[i] for i in range(self.packs)]

    def _most_that_fit(
        self, most: int, budget: int, ways: Sequence[int], unfilled: Sequence[float]
    ) -> tuple[int, list[list[int]]] | None:
        """Nearly the largest number of strata whose slots go into the packs in one of these ways; None: none of those
        that leave such shares unfilled."""

        def packed(number: int) -> list[list[int]] | None:
            self._ends = self._ends_of(number)
            return pack_window(self._lengths[self.kinds(0)], self.packs, budget, ways)

        too_many, fitting = most + 1, None
        for share in unfilled:
            number = max(int(most * (1 - share)), self.packs)
            if (fitting := packed(number)) is not None:
                break
            too_many = number
        if fitting is None:
            return None
        for _ in range(REFINED):
            middle = (number + too_many) // 2
            if middle == number:
                break
            if (better := packed(middle)) is not None:
                number, fitting = middle, better
            else:
                too_many = middle
        return number, fitting


def _van_der_corput(w: int) -> int:
    """The w-th number of the sequence in units of 2⁻³²: the bits of w behind the point, in reverse."""
    return int(f"{w % (1 << BITS):0{BITS}b}"[::-1], 2)
